"""The contract in plain JAX: what every backend must equal. Any device, any shapes; queries are tiled so that scores stay small."""

import functools
import math

import jax
import jax.numpy as jnp

from svlm_jax.kernels.ring_attention.api import Regions
from svlm_jax.kernels.ring_attention.int8 import Int8Rows, Rows

SCORE_BYTES = 512 << 20  # one tile's float32 scores stay under this


def _weighted(weights: jax.Array, values: Rows, dtype) -> jax.Array:
    """The float32 sum of values [B, K, s, H] with weights [B, K, G, T, s]; numbers of eight bits are multiplied as `dtype`."""
    if isinstance(values, Int8Rows):
        weights, values = weights * values.scale[:, :, None, None], values.values.astype(dtype)
    return jnp.einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _merge(parts: list[jax.Array], values: list[Rows], dtype) -> tuple[jax.Array, jax.Array]:
    """Softmax over the concatenation of score parts [B, K, G, T, s], without concatenating the values [B, K, s, H]."""
    peak = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1) for s in parts])
    safe = jnp.where(jnp.isfinite(peak), peak, 0.0)[..., None]
    weights = [jnp.exp(s - safe) for s in parts]
    total = sum(jnp.sum(w, axis=-1) for w in weights)
    out = sum(_weighted(w, v, dtype) for w, v in zip(weights, values, strict=True))
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1.0, total)) + safe[..., 0])
    return out, lse


def _tile(q, rows, k, v, valid, regions, self_k, self_v, self_valid, scale):
    """One tile of queries q [B, R, t, N, H], whose first row is row `rows` of the chunk."""
    batch, copies, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, copies, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 3, 1, 4, 2, 5)  # [B, K, R, G, t, H]

    def scores(query, keys):
        if isinstance(keys, Int8Rows):
            met = jnp.einsum("bkgth,bksh->bkgts", query, keys.values.astype(query.dtype), preferred_element_type=jnp.float32)
            return met * (keys.scale[:, :, None, None] * scale)
        return jnp.einsum("bkgth,bksh->bkgts", query, keys, preferred_element_type=jnp.float32) * scale

    parts, values = [], []
    if not k.shape[2]:
        pass  # no cache: the new tokens see themselves alone
    elif length * heads // kv_heads * copies <= 64:
        # Few rows: all copies of the query against all keys in one product that reads the cache once.
        flat = grouped.reshape(batch, kv_heads, -1, length, head_dim)
        every = scores(flat, k).reshape(batch, kv_heads, copies, -1, length, k.shape[2])
        cached = jnp.concatenate([every[:, :, r, ..., start:stop] for r, (start, stop) in enumerate(regions)], axis=-1)
        parts.append(jnp.where(valid[:, None, None, None], cached, -jnp.inf))
        values.append(v)
    else:
        for r, (start, stop) in enumerate(regions):
            if start == stop:
                continue
            region_k, region_v = jax.tree.map(lambda a, start=start, stop=stop: a[:, :, start:stop], (k, v))
            parts.append(jnp.where(valid[:, None, None, None, start:stop], scores(grouped[:, :, r], region_k), -jnp.inf))
            values.append(region_v)
    if self_k is not None:
        row = jnp.arange(length)[:, None] + rows
        mask = (row >= jnp.arange(self_k.shape[2])) & self_valid[:, None]
        parts.append(jnp.where(mask[:, None, None], scores(grouped[:, :, -1], self_k), -jnp.inf))
        values.append(self_v)
    out, lse = _merge(parts, values, q.dtype)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim).astype(q.dtype)
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, length, heads)


def ring_attention_reference(
    q: jax.Array,
    k: Rows,
    v: Rows,
    valid: jax.Array,
    self_k: jax.Array | None = None,
    self_v: jax.Array | None = None,
    self_valid: jax.Array | None = None,
    *,
    regions: Regions,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ring_attention`."""
    batch, _, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    row_bytes = 4 * batch * heads * (k.shape[2] + (0 if self_k is None else length))
    tiles = min(length, math.ceil(length * row_bytes / SCORE_BYTES))
    while length % tiles:
        tiles += 1
    if tiles == 1:
        return _tile(q, 0, k, v, valid, regions, self_k, self_v, self_valid, scale)
    size = length // tiles
    stacked = jnp.moveaxis(q.reshape(*q.shape[:2], tiles, size, heads, head_dim), 2, 0)
    out, lse = jax.lax.map(
        lambda tile: _tile(tile[1], tile[0] * size, k, v, valid, regions, self_k, self_v, self_valid, scale), (jnp.arange(tiles), stacked)
    )
    return jnp.moveaxis(out, 0, 1).reshape(batch, length, heads, head_dim), jnp.moveaxis(lse, 0, 1).reshape(batch, length, heads)
