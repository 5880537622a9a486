"""Mosaic GPU backend, host side: which calls it takes, and what it hands to the kernel."""

import math

import jax
import jax.numpy as jnp

from svlm_jax.kernels.backends import Unsupported
from svlm_jax.kernels.ring_attention.api import Regions
from svlm_jax.kernels.ring_attention.int8 import Int8Rows, Rows, widen
from svlm_jax.kernels.ring_attention.tiles import HIDDEN, TILE, visited_tiles

MULTIPROCESSORS = 132  # of an H100: one block each
LOG2_E = math.log2(math.e)


def check(q: jax.Array, k: Rows, self_k: jax.Array | None) -> None:
    """Unsupported names the reason."""
    if q.dtype != jnp.bfloat16 or (k.dtype != jnp.bfloat16 and not isinstance(k, Int8Rows)):
        raise Unsupported(f"takes bfloat16 over bfloat16 or int8, not {q.dtype} queries over {k.dtype} keys")
    if q.shape[-1] not in (64, 128):
        raise Unsupported(f"takes heads of 64 or 128, not {q.shape[-1]}")
    rows = q.shape[2] * q.shape[3] // k.shape[1]
    if rows <= 64 and k.shape[2]:
        return
    if self_k is None or q.shape[2] < 64:
        raise Unsupported(f"takes chunks of at least 64 new tokens, or few over a cache: not {q.shape[2]} over {k.shape[2]} slots")


def ring_attention_mosaic_gpu(
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
    plan: tuple[jax.Array, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ring_attention`; `plan` is what `prepare` made of the same `valid` and `regions`.

    The chunk is padded to a multiple of 128 rows, which count as keys for nobody. It meets keys and values in eight bits as a bfloat16
    copy of one layer's, at the default windows 31 MB, whose making is 2% of a prefill's floor; a decoding step reads them as they are.
    """
    check(q, k, self_k)
    if q.shape[2] * q.shape[3] // k.shape[1] <= 64 and k.shape[2]:
        return _few(q, k, v, self_k, self_v, self_valid, prepare(valid, regions) if plan is None else plan, scale=scale)
    from svlm_jax.kernels.ring_attention.mosaic_gpu_kernel import GROUPS, ROWS, Shapes, prefill

    assert self_k is not None and self_v is not None and self_valid is not None
    batch, copies, length, heads, head_dim = q.shape
    if not k.shape[2]:  # no cache at all: the kernel is given one tile, which it does not visit
        k, v = (jnp.zeros((batch, k.shape[1], TILE, head_dim), q.dtype) for _ in range(2))
        plan = prepare(jnp.zeros((batch, TILE), jnp.bool_), ((0, TILE),) * copies)
    k, v = widen(k, q.dtype), widen(v, q.dtype)
    pad = -length % (GROUPS * ROWS)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0), (0, 0)))
    self_k, self_v = (jnp.pad(a, ((0, 0), (0, 0), (0, pad), (0, 0))) for a in (self_k, self_v))
    self_valid = jnp.pad(self_valid, ((0, 0), (0, pad)))
    shapes = Shapes(
        batch=batch,
        regions=copies,
        length=length + pad,
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=head_dim,
        dtype=jnp.dtype(q.dtype),
        scale=head_dim**-0.5 if scale is None else scale,
    )
    tiles, first, hidden = prepare(valid, regions) if plan is None else plan
    out, lse = prefill(shapes, q, k, v, hidden, self_k, self_v, _hidden(self_valid), tiles, first)
    return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]


def _hidden(counts: jax.Array) -> jax.Array:
    """What is added to the scores of slots: 0 where they count."""
    return jnp.where(counts, 0.0, HIDDEN).astype(jnp.float32)


def prepare(valid: jax.Array, regions: Regions) -> tuple[jax.Array, ...]:
    """`visited_tiles`, and float32 [B, S] what is added to the score of a slot."""
    return *visited_tiles(valid, regions), _hidden(valid)


def _few(q, k, v, self_k, self_v, self_valid, plan, *, scale) -> tuple[jax.Array, jax.Array]:
    """At most 64 query rows a key-value head: the cache by the decoding kernel, shares and new tokens joined in float32."""
    from svlm_jax.kernels.ring_attention.mosaic_gpu_decode import DecodeShapes, decode
    from svlm_jax.kernels.ring_attention.mosaic_gpu_kernel import ROWS

    batch, copies, length, heads, head_dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    count, scale = length * group, head_dim**-0.5 if scale is None else scale
    # [B, K, R, (t, g), H]
    rows = q.reshape(batch, copies, length, kv_heads, group, head_dim).transpose(0, 3, 1, 2, 4, 5).reshape(batch, kv_heads, copies, count, head_dim)
    shapes = DecodeShapes(
        batch=batch,
        regions=copies,
        rows=-(-count // 8) * 8,
        kv_heads=kv_heads,
        head_dim=head_dim,
        splits=max(1, min(MULTIPROCESSORS // (batch * kv_heads), k.shape[2] // TILE)),
        dtype=jnp.dtype(q.dtype),
        scale=scale,
        eight=isinstance(k, Int8Rows),
    )
    tiles, first, hidden = plan
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, ROWS - count), (0, 0)))
    scales = (k.scale, v.scale) if isinstance(k, Int8Rows) else ()
    k, v = (rows.values if isinstance(rows, Int8Rows) else rows for rows in (k, v))
    sums, peak, total = decode(shapes, padded, k, v, hidden, tiles, first, *scales)
    sums, peak, total = sums[..., :count, :], peak[..., :count], total[..., :count]
    highest, summed, weighed = jnp.max(peak, axis=2), jnp.zeros_like(sums[:, :, 0]), jnp.zeros_like(total[:, :, 0])
    if self_k is not None and self_v is not None and self_valid is not None:
        scores = jnp.einsum("bkrh,bksh->bkrs", rows[:, :, -1], self_k, preferred_element_type=jnp.float32) * (scale * LOG2_E)
        sees = (jnp.arange(count)[:, None] // group >= jnp.arange(length)) & self_valid[:, None, None]
        scores = jnp.where(sees, scores, HIDDEN)
        highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
        own = jnp.exp2(scores - highest[..., None])
        summed, weighed = jnp.einsum("bkrs,bksh->bkrh", own, self_v.astype(jnp.float32)), jnp.sum(own, axis=-1)
    weight = jnp.exp2(peak - highest[:, :, None])
    summed += jnp.sum(sums * weight[..., None], axis=2)
    weighed += jnp.sum(total * weight, axis=2)
    safe = jnp.where(weighed == 0, 1.0, weighed)
    lse = jnp.where(weighed == 0, -jnp.inf, highest / LOG2_E + jnp.log(safe))

    def back(a: jax.Array) -> jax.Array:
        """[B, K, (t, g), ...] as [B, T, N, ...]."""
        a = a.reshape(batch, kv_heads, length, group, *a.shape[3:])
        return jnp.moveaxis(a, 1, 2).reshape(batch, length, heads, *a.shape[4:])

    return back(summed / safe[..., None]).astype(q.dtype), back(lse)
