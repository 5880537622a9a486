"""Attention of a few new tokens over a ring of cached slots: the contract, and the choice of a backend."""

import functools
import importlib
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from svlm_jax.kernels.backends import Backend, choose, names_on
from svlm_jax.kernels.ring_attention.int8 import Int8Rows, Rows
from svlm_jax.kernels.ring_attention.mesh import over_mesh

Regions = tuple[tuple[int, int], ...]
Plan = dict[str, tuple[jax.Array, ...]]  # by a backend's name, what that one made of validity bits
log = logging.getLogger(__name__)


def ring_attention(
    q: jax.Array,
    k: Rows,
    v: Rows,
    valid: jax.Array,
    *,
    regions: Regions,
    self_k: jax.Array | None = None,
    self_v: jax.Array | None = None,
    self_valid: jax.Array | None = None,
    scale: float | None = None,
    backend: str | None = None,
    plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to every valid slot, and causally to the new tokens themselves.

    Order in memory means nothing: a slot counts if its validity bit is set, whatever stands beside it. Keys are stored
    rotated; each region of slots has its own shift, so the query comes once for each region, rotated for it.

    Args:
      q: [B, R, T, N, H] queries, one rotated copy for each of the R regions.
      k, v: [B, K, S, H] cached keys, as stored, and values; head-major, one layer's. Both may be `int8.Int8Rows`.
      valid: bool [B, S].
      regions: R static (start, stop) pairs of slots, multiples of 128, in order, covering S.
      self_k, self_v: [B, K, T, H] the new tokens' keys (rotated for the last region) and values; None: cache only.
      self_valid: bool [B, T] which of the new tokens count as keys.
      scale: of the scores; H ** -0.5 by default.
      backend: a name in `BACKENDS`; None takes the first that accepts the call.
      plan: what `prepare` made of the same `valid` and `regions`, for calls that share them; None: every call makes its own.

    Returns:
      out [B, T, N, H] in q.dtype, and the float32 log-sum-exp of the scores [B, T, N]. A row that has nothing to attend
      to gives out 0 and lse -inf.

    Raises:
      ValueError: shapes or regions that break the contract.
      Unsupported: `backend` does not take this call; the message says why.
    """
    _check(q, k, v, valid, regions, self_k, self_v, self_valid)
    call = choose(log, "ring_attention", _BACKENDS, q, k, self_k) if backend is None else _BACKENDS[backend].call
    with jax.named_scope("ring_attention"):
        return call(q, k, v, valid, self_k, self_v, self_valid, plan or {}, regions=regions, scale=scale)


def prepare(valid: jax.Array, *, regions: Regions) -> Plan:
    """What backends make of validity bits before they look at keys, made once for the layers of a step. A compiler drops what is not used.

    Args:
      valid: bool [B, S].
      regions: as for `ring_attention`.
    """
    with jax.named_scope("ring_plan"):
        return {name: make(valid, regions) for name, make in _PREPARE.items()}


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
    if type(k) is not type(v) and Int8Rows in (type(k), type(v)):
        raise ValueError(f"keys are {k.dtype} and values are {v.dtype}: both are kept in eight bits, or neither")
    if valid.dtype != jnp.bool_:
        raise ValueError(f"valid is {valid.dtype}, not bool")


def _late(module: str, name: str) -> Callable:
    """A function of a backend, imported where it is called: each pulls in its own part of Pallas."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module(f"svlm_jax.kernels.ring_attention.{module}"), name)(*args, **kwargs)

    return call


def _own_plan(name: str, call: Callable) -> Callable:
    """A backend's call, which picks what it made of validity bits itself."""

    def bound(q, k, v, valid, self_k, self_v, self_valid, plan, **static):
        return call(q, k, v, valid, self_k, self_v, self_valid, plan=plan.get(name), **static)

    return bound


def _mosaic(platform: str, module: str) -> Backend:
    call = functools.partial(over_mesh, _late(module, f"ring_attention_{module}"))
    return Backend(platform, _late(module, "check"), _own_plan(module, call))


def _reference(q, k, v, valid, self_k, self_v, self_valid, plan, **static):
    del plan
    return _late("reference", "ring_attention_reference")(q, k, v, valid, self_k, self_v, self_valid, **static)


# In the order in which they are tried
_BACKENDS = {
    "mosaic_gpu": _mosaic("cuda", "mosaic_gpu"),
    "mosaic_tpu": _mosaic("tpu", "mosaic_tpu"),
    "reference": Backend(None, lambda q, k, self_k: None, _reference),
}
_PREPARE = {name: _late(name, "prepare") for name in ("mosaic_gpu", "mosaic_tpu")}  # what can be made of `valid` and `regions` alone
BACKENDS = tuple(_BACKENDS)


def backends(platform: str) -> tuple[str, ...]:
    """Those that run on a platform, as devices name it: "cpu", "gpu" or "tpu"."""
    return names_on(_BACKENDS, platform)
