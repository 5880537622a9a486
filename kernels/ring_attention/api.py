"""Attention of a few new tokens over a ring of cached slots: the contract, and the choice of a backend."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Regions = tuple[tuple[int, int], ...]
log = logging.getLogger(__name__)


class Unsupported(NotImplementedError):
    """A backend's reason for not taking a call; the next one is tried."""


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    *,
    regions: Regions,
    self_k: jax.Array | None = None,
    self_v: jax.Array | None = None,
    self_valid: jax.Array | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to every valid slot, and causally to the new tokens themselves.

    Order in memory means nothing: a slot counts if its validity bit is set, whatever stands beside it. Keys are stored
    rotated; each region of slots has its own shift, so the query comes once for each region, rotated for it.

    Args:
      q: [B, R, T, N, H] queries, one rotated copy for each of the R regions.
      k, v: [B, K, S, H] cached keys, as stored, and values; head-major, one layer's.
      valid: bool [B, S].
      regions: R static (start, stop) pairs of slots, multiples of 128, in order, covering S.
      self_k, self_v: [B, K, T, H] the new tokens' keys (rotated for the last region) and values; None: cache only.
      self_valid: bool [B, T] which of the new tokens count as keys.
      scale: of the scores; H ** -0.5 by default.
      backend: a name in `BACKENDS`; None takes the first that accepts the call.

    Returns:
      out [B, T, N, H] in q.dtype, and the float32 log-sum-exp of the scores [B, T, N]. A row that has nothing to attend
      to gives out 0 and lse -inf.

    Raises:
      ValueError: shapes or regions that break the contract.
      Unsupported: `backend` does not take this call; the message says why.
    """
    _check(q, k, v, valid, regions, self_k, self_v, self_valid)
    call = _choose(q, k, self_k) if backend is None else _BACKENDS[backend].call
    with jax.named_scope("ring_attention"):
        return call(q, k, v, valid, self_k, self_v, self_valid, regions=regions, scale=scale)


def _check(q, k, v, valid, regions, self_k, self_v, self_valid) -> None:
    batch, copies, length, heads, head_dim = q.shape
    _, kv_heads, slots, _ = k.shape
    if copies != len(regions):
        raise ValueError(f"q has {copies} rotated copies for {len(regions)} regions")
    edges = [0, *(stop for _, stop in regions)]
    if [start for start, _ in regions] != edges[:-1] or edges[-1] != slots or any(edge % 128 for edge in edges):
        raise ValueError(f"regions {regions} must cover {slots} slots in order, with edges at multiples of 128")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads evenly")
    expected = {"k": (k, (batch, kv_heads, slots, head_dim)), "v": (v, k.shape), "valid": (valid, (batch, slots))}
    if self_k is not None:
        fresh = (batch, kv_heads, length, head_dim)
        expected |= {"self_k": (self_k, fresh), "self_v": (self_v, fresh), "self_valid": (self_valid, (batch, length))}
    for name, (array, shape) in expected.items():
        if array is None or array.shape != shape:
            raise ValueError(f"{name} has shape {None if array is None else array.shape}, not {shape}")
    if valid.dtype != jnp.bool_:
        raise ValueError(f"valid is {valid.dtype}, not bool")


def _reference(*args, **kwargs):
    from svlm_jax.kernels.ring_attention.reference import ring_attention_reference

    return ring_attention_reference(*args, **kwargs)


def _mosaic_gpu(*args, **kwargs):
    from svlm_jax.kernels.ring_attention.mosaic_gpu import ring_attention_mosaic_gpu

    return ring_attention_mosaic_gpu(*args, **kwargs)


def _check_mosaic_gpu(q: jax.Array, k: jax.Array, self_k: jax.Array | None) -> None:
    from svlm_jax.kernels.ring_attention.mosaic_gpu import check

    check(q, k, self_k)


class _Backend(NamedTuple):
    platform: str | None  # as `jax.lax.platform_dependent` names it; None: any
    check: Callable  # raises Unsupported with the reason for which it does not take a call
    call: Callable


# In the order in which they are tried
_BACKENDS = {
    "mosaic_gpu": _Backend("cuda", _check_mosaic_gpu, _mosaic_gpu),
    "reference": _Backend(None, lambda q, k, self_k: None, _reference),
}
BACKENDS = tuple(_BACKENDS)


@functools.lru_cache(maxsize=256)
def _log_once(name: str, reason: str) -> None:
    log.info("ring_attention: backend %s not taken: %s", name, reason)


def _choose(q: jax.Array, k: jax.Array, self_k: jax.Array | None) -> Callable:
    """The first backend that takes the call, for each platform: which one runs is settled when the program is lowered."""
    chosen: dict[str, Callable] = {}
    for name, backend in _BACKENDS.items():
        try:
            backend.check(q, k, self_k)
        except Unsupported as reason:
            _log_once(name, str(reason))
            continue
        chosen.setdefault(backend.platform or "default", backend.call)
    if len(chosen) == 1:
        return chosen["default"]

    def call(*arrays, **static):
        branches = {platform: functools.partial(backend, **static) for platform, backend in chosen.items()}
        return jax.lax.platform_dependent(*arrays, **branches)

    return call
