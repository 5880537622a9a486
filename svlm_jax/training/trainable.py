"""Parameters as a flat dict by dotted path, and its two parts: what is trained and what is frozen."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from svlm_jax.errors import UserError
from svlm_jax.types import Params

Flat = dict[str, Any]  # `text.layers.qkv`, `vision.blocks.0.qkv`: leaf


def flatten(params: dict[Any, Any], prefix: str = "") -> Flat:
    out: Flat = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        out |= flatten(value, f"{path}.") if isinstance(value, dict) and value else {path: value} if not isinstance(value, dict) else {}
    return out


def unflatten(flat: Flat) -> Params:
    """`flatten` backwards; numbers in a path are integers, as blocks are counted in the parameters."""
    out: dict[Any, Any] = {}
    for path, leaf in flat.items():
        *parents, name = (int(part) if part.isdigit() else part for part in path.split("."))
        inner = out
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return out


def matching(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The paths that any of the patterns matches (`*` for anything, dots included). UserError for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise UserError(f"the pattern {pattern!r} matches no parameter: they are called {', '.join(_examples(paths))}")
    return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]


def split(flat: Flat, frozen: Sequence[str]) -> tuple[Flat, Flat]:
    """(trained, frozen) by patterns. UserError where nothing is left to train."""
    cold = set(matching(list(flat), frozen))
    if len(cold) == len(flat):
        raise UserError(f"frozen = {', '.join(frozen)} leaves nothing to train: freeze less")
    return {k: v for k, v in flat.items() if k not in cold}, {k: v for k, v in flat.items() if k in cold}


def _examples(paths: Sequence[str]) -> list[str]:
    """One path of each kind: blocks and layers are alike."""
    return [path for path in paths if not any(part.isdigit() and part != "0" for part in path.split("."))]
