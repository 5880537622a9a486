"""Ring attention on TPUs: blocks of slots of one region stream through fast memory, under running float32 statistics.

A grid step takes a few key-value heads, a tile of query rows and one block of keys: first the blocks of the cache that hold
anything, each with the query's copy for its region, then the chunk's own keys up to the diagonal. The steps that are left over
when blocks are skipped fetch nothing and compute nothing. Rows are (token, query head of the group), so row r is token r // G.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from svlm_jax.kernels.ring_attention.tiles import HIDDEN, LOWEST, TILE

LANES = 128
VMEM_BYTES = 48 << 20  # of at least 64 MiB on every chip from v5e on


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All that is static about one call."""

    batch: int
    kv_heads: int
    group: int  # query heads of a key-value head
    regions: int
    head_dim: int
    row_tiles: int
    rows: int  # of a tile
    heads: int  # key-value heads of a step
    blocks: int  # of the cache
    block: int  # slots of a block
    own_blocks: int  # of the chunk; 0: the cache only
    own: int  # keys of such a block
    dtype: jnp.dtype
    scale: float
    eight: bool  # the cache's keys and values are int8, with scales


def _attention(shapes: Shapes, order_ref, count_ref, start_ref, region_ref, q_ref, k_ref, v_ref, held_ref, *rest):
    del start_ref, region_ref  # read where blocks are fetched
    (k_scale_ref, v_scale_ref), rest = (rest[:2], rest[2:]) if shapes.eight else ((None, None), rest)
    (self_k_ref, self_v_ref, self_held_ref), rest = (rest[:3], rest[3:]) if shapes.own_blocks else ((None,) * 3, rest)
    out_ref, lse_ref, peak_ref, total_ref, sums_ref = rest
    batch, row_tile, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    precision = lax.Precision.HIGHEST if shapes.dtype == jnp.float32 else None

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def meet(head: int, keys, values, counts, k_scale=None, v_scale=None):
        """One block of keys and values [s, H] of a head, those that count [1 or rows, s], and scales of the slots [1, s] if they have some."""
        scores = lax.dot_general(q_ref[0, 0, head], keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        scores *= shapes.scale if k_scale is None else k_scale * shapes.scale
        scores = jnp.where(counts, scores, HIDDEN)
        peak = peak_ref[head][:, :1]
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
        decay, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak)
        peak_ref[head] = jnp.broadcast_to(new_peak, peak_ref.shape[1:])
        total_ref[head] = total_ref[head] * decay + jnp.sum(weights, axis=1, keepdims=True)
        weights = weights if v_scale is None else weights * v_scale
        met = jnp.dot(weights.astype(shapes.dtype), values, precision=precision, preferred_element_type=jnp.float32)
        sums_ref[head] = sums_ref[head] * decay + met

    @pl.when(step < count_ref[batch])
    def _():
        counts, block = held_ref[0, 0] > 0, (shapes.block, shapes.head_dim)
        for head in range(shapes.heads):
            keys, values = (ref[0, head].reshape(block).astype(shapes.dtype) for ref in (k_ref, v_ref))
            meet(head, keys, values, counts, *(_row(ref[0, head], shapes) for ref in (k_scale_ref, v_scale_ref) if ref is not None))

    if self_k_ref is not None and self_v_ref is not None and self_held_ref is not None:
        first = (step - shapes.blocks) * shapes.own

        @pl.when((step >= shapes.blocks) & (first * shapes.group < (row_tile + 1) * shapes.rows))
        def _():
            row = lax.broadcasted_iota(jnp.int32, (shapes.rows, shapes.own), 0) + row_tile * shapes.rows
            key = lax.broadcasted_iota(jnp.int32, (shapes.rows, shapes.own), 1) + first
            counts = (row >= key * shapes.group) & (self_held_ref[0] > 0)
            for head in range(shapes.heads):
                meet(head, self_k_ref[0, head], self_v_ref[0, head], counts)

    @pl.when(step == shapes.blocks + shapes.own_blocks - 1)
    def _():
        for head in range(shapes.heads):
            total = total_ref[head]
            safe = jnp.where(total == 0.0, 1.0, total)
            out_ref[0, head] = (sums_ref[head] / safe[:, :1]).astype(shapes.dtype)
            lse = jnp.where(total == 0.0, -jnp.inf, peak_ref[head] + jnp.log(safe))
            lse_ref[0, head] = jnp.swapaxes(lse, 0, 1)[:1]


def _row(scale, shapes: Shapes):
    """Scales [tiles, 1, TILE] of a block as one row."""
    return jnp.concatenate([scale[tile] for tile in range(shapes.block // TILE)], axis=1)


@functools.partial(jax.jit, static_argnames="shapes")
def attention(shapes: Shapes, plan, q, k, v, scales, *own) -> tuple[jax.Array, jax.Array]:
    """Launches the kernel.

    Args:
      plan: order [B, blocks], count [B], start [blocks] (in tiles), region [blocks], held [B, blocks, 1, block].
      q: [B, R, K, row_tiles * rows, H].
      k, v: [B, K, S, H].
      scales: those of keys and of values, float32 [B, K, S]; or nothing.
      own: self_k and self_v [B, K, own_blocks * own, H], self_held float32 [B, 1, own_blocks * own]; or nothing.

    Returns:
      out [B, K, row_tiles * rows, H], lse float32 [B, K, 1, row_tiles * rows].
    """
    s = shapes
    order, count, start, region, held = plan
    # The compiler else moves a whole layer's cache into fast memory before the call, and back after the append
    k, v = (pltpu.with_memory_space_constraint(a.reshape(s.batch, s.kv_heads, -1, TILE, s.head_dim), pltpu.HBM) for a in (k, v))

    def block_of(b, j, order_ref):
        return order_ref[b, jnp.minimum(j, s.blocks - 1)]

    def q_index(b, g, i, j, order_ref, count_ref, start_ref, region_ref):
        cached = region_ref[block_of(b, j, order_ref)]
        return b, jnp.where(j < s.blocks, cached, s.regions - 1), g, i, 0

    def cache_index(b, g, i, j, order_ref, count_ref, start_ref, region_ref):
        return b, g * s.heads, start_ref[block_of(b, j, order_ref)], 0, 0

    def held_index(b, g, i, j, order_ref, count_ref, start_ref, region_ref):
        return b, block_of(b, j, order_ref), 0, 0

    def own_block(i, j):
        last = lax.div((i + 1) * s.rows - 1, jnp.int32(s.group * s.own))  # that a row of this tile sees
        return jnp.clip(j - s.blocks, 0, jnp.minimum(last, s.own_blocks - 1))

    cached = tuple(pl.Element(n) for n in (1, s.heads, s.block // TILE, TILE, s.head_dim))
    in_specs = [
        pl.BlockSpec((1, 1, s.heads, s.rows, s.head_dim), q_index),
        pl.BlockSpec(cached, cache_index),
        pl.BlockSpec(cached, cache_index),
        pl.BlockSpec((1, 1, 1, s.block), held_index),
    ]
    scales = tuple(a.reshape(s.batch, s.kv_heads, -1, 1, TILE) for a in scales)
    tiles = tuple(pl.Element(n) for n in (1, s.heads, s.block // TILE, 1, TILE))
    in_specs += [pl.BlockSpec(tiles, cache_index) for _ in scales]
    if own:
        fresh = pl.BlockSpec((1, s.heads, s.own, s.head_dim), lambda b, g, i, j, *_: (b, g, own_block(i, j), 0))
        in_specs += [fresh, fresh, pl.BlockSpec((1, 1, s.own), lambda b, g, i, j, *_: (b, 0, own_block(i, j)))]
    rows = s.row_tiles * s.rows
    keys = s.blocks * s.block + s.own_blocks * s.own
    operands = (q, k, v, held, *scales, *own)
    out, lse = pl.pallas_call(
        functools.partial(_attention, s),
        name="ring_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(s.batch, s.kv_heads // s.heads, s.row_tiles, s.blocks + s.own_blocks),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, s.heads, s.rows, s.head_dim), lambda b, g, i, j, *_: (b, g, i, 0)),
                pl.BlockSpec((1, s.heads, 1, s.rows), lambda b, g, i, j, *_: (b, g, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((s.heads, s.rows, LANES), jnp.float32),
                pltpu.VMEM((s.heads, s.rows, LANES), jnp.float32),
                pltpu.VMEM((s.heads, s.rows, s.head_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((s.batch, s.kv_heads, rows, s.head_dim), s.dtype),
            jax.ShapeDtypeStruct((s.batch, s.kv_heads, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * s.batch * s.kv_heads * rows * keys * s.head_dim,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands) + s.batch * s.kv_heads * rows * (s.head_dim * q.dtype.itemsize + 4),
            transcendentals=s.batch * s.kv_heads * rows * keys,
        ),
    )(order, count, start, region, *operands)
    return out, lse
