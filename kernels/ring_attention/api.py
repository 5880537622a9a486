"""Attention of a few new tokens over a ring of cached slots: the contract, and the choice of a backend."""

import functools
import logging
from collections.abc import Callable

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
    """
    _check(q, k, v, valid, regions, self_k, self_v, self_valid)
    call = functools.partial(_BACKENDS[backend], regions=regions, scale=scale) if backend else _first(q, k, regions, scale)
    with jax.named_scope("ring_attention"):
        return call(q, k, v, valid, self_k=self_k, self_v=self_v, self_valid=self_valid)


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


_BACKENDS: dict[str, Callable] = {"reference": _reference}
BACKENDS = tuple(_BACKENDS)


def _first(q, k, regions, scale) -> Callable:
    return functools.partial(_reference, regions=regions, scale=scale)
