"""One operation, several backends: tried in order for each platform, and whoever does not take a call says why, once, in the log."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Unsupported(NotImplementedError):
    """A backend's reason for not taking a call; the next one is tried."""


class Backend(NamedTuple):
    """One way to compute an operation."""

    platform: str | None  # as `jax.lax.platform_dependent` names it; None: any
    check: Callable  # raises Unsupported with the reason for which it does not take a call
    call: Callable


def names_on(backends: Mapping[str, Any], platform: str) -> tuple[str, ...]:
    """Those that run on a platform, as devices name it: "cpu", "gpu" or "tpu"."""
    return tuple(name for name, backend in backends.items() if backend.platform in (None, {"gpu": "cuda"}.get(platform, platform)))


@functools.lru_cache(maxsize=256)
def _log_once(log: logging.Logger, operation: str, name: str, reason: str) -> None:
    log.info("%s: backend %s not taken: %s", operation, name, reason)


def choose(log: logging.Logger, operation: str, backends: Mapping[str, Any], *checked: Any, **how: Any) -> Callable:
    """The first backend that takes the call, for each platform: which one runs is settled when the program is lowered.

    Args:
      checked, how: what backends look at. The last backend takes everything, anywhere.
    """
    chosen: dict[str, Callable] = {}
    for name, backend in backends.items():
        try:
            backend.check(*checked, **how)
        except Unsupported as reason:
            _log_once(log, operation, name, str(reason))
            continue
        chosen.setdefault(backend.platform or "default", backend.call)
    if len(chosen) == 1:
        return chosen["default"]

    def call(*arrays, **static):
        branches = {platform: functools.partial(backend, **static) for platform, backend in chosen.items()}
        return jax.lax.platform_dependent(*arrays, **branches)

    return call
