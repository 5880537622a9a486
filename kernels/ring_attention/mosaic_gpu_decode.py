"""Ring decoding on Hopper: a few query rows against many slots, bound by reading the cache once.

Each block takes one key-value head and a share of the tiles that hold anything, keeps two tiles in flight, and leaves an
unnormalised sum with its running maximum; the caller joins the shares. The rows are the G query heads of the group times
the new tokens, padded to the 64 rows of a warpgroup's matrix product.

Keys and values in eight bits cross the memory as they are, and are converted tile by tile where they have arrived. Their scales, one a slot,
multiply scores and weights.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from svlm_jax.kernels.ring_attention.mosaic_gpu_kernel import ACC, ROWS, load
from svlm_jax.kernels.ring_attention.tiles import LOWEST, TILE

STAGES = 2


@dataclasses.dataclass(frozen=True)
class DecodeShapes:
    """All that is static about one decoding call."""

    batch: int
    regions: int
    rows: int  # that count, a multiple of 8, at most ROWS
    kv_heads: int
    head_dim: int
    splits: int
    dtype: jnp.dtype
    scale: float
    eight: bool  # the cache's keys and values are int8, with scales

    @property
    def out_columns(self) -> int:
        """Of the sums that leave at once: half of them where four copies of the query take the room."""
        return self.head_dim if self.regions < 4 else self.head_dim // 2


def _decode(shapes: DecodeShapes, q_ref, k_ref, v_ref, hidden_ref, tiles_ref, first_ref, *rest):
    scales, rest = (rest[:2], rest[2:]) if shapes.eight else ((), rest)
    out_ref, peak_ref, total_ref, q_smem, k_smem, v_smem, hidden_smem, out_smem, sums_smem, q_ready, k_ready, v_ready, *more = rest
    wides, scales_smem = more[:1], more[1:]
    split, head, batch = lax.axis_index("split"), lax.axis_index("head"), lax.axis_index("batch")
    tiles = first_ref[batch, shapes.regions]
    share = lax.div(tiles + (shapes.splits - 1), jnp.int32(shapes.splits))
    start = jnp.minimum(split * share, tiles)
    stop = jnp.minimum(start + share, tiles)

    def fetch(index):
        slot = lax.rem(index - start, jnp.int32(STAGES))
        rows = pl.ds(tiles_ref[batch, index] * TILE, TILE)
        plgpu.copy_gmem_to_smem(k_ref.at[batch, head, rows], k_smem.at[slot], k_ready.at[slot])
        plgpu.copy_gmem_to_smem(hidden_ref.at[batch, rows], hidden_smem.at[slot], k_ready.at[slot])
        plgpu.copy_gmem_to_smem(v_ref.at[batch, head, rows], v_smem.at[slot], v_ready.at[slot])
        for source, into, ready in zip(scales, scales_smem, (k_ready, v_ready)[: len(scales)], strict=True):
            plgpu.copy_gmem_to_smem(source.at[batch, head, rows], into.at[slot], ready.at[slot])

    def wide(tile):
        """A tile of keys or values in the type of the queries; the next one takes its place."""
        if not shapes.eight:
            return tile
        (wide_smem,) = wides
        for first in range(0, TILE, ROWS):  # half a tile at a time: registers hold the sums as well
            half = pl.ds(first, ROWS)
            wide_smem[half] = load(tile.at[half], plgpu.Layout.WGMMA_UPCAST_2X).astype(shapes.dtype)
        plgpu.commit_smem()
        return wide_smem

    def of_slots(ref, shape):
        return lax.broadcast_in_dim(load(ref, plgpu.Layout.WGMMA.reduce(0)), shape, [1])

    for region in range(shapes.regions):
        plgpu.copy_gmem_to_smem(q_ref.at[batch, head, region], q_smem.at[region], q_ready)
    for ahead in range(STAGES):
        pl.when(start + ahead < stop)(functools.partial(fetch, start + ahead))
    plgpu.barrier_wait(q_ready)

    def step(index, carry):
        acc, peak, total = carry
        slot = lax.rem(index - start, jnp.int32(STAGES))
        region = sum((index >= first_ref[batch, r]).astype(jnp.int32) for r in range(1, shapes.regions)) + jnp.int32(0)
        plgpu.barrier_wait(k_ready.at[slot])
        keys = wide(k_smem.at[slot])

        def product(scores):
            plgpu.wgmma(scores, q_smem.at[region], keys.transpose((1, 0)))
            return scores[...]

        scores = pl.run_scoped(product, ACC((ROWS, TILE), jnp.float32))
        if shapes.eight:
            scores *= of_slots(scales_smem[0].at[slot], scores.shape)
        scores = scores * (shapes.scale * math.log2(math.e)) + of_slots(hidden_smem.at[slot], scores.shape)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        decay = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        total = total * decay + weights.sum(axis=1)
        if not shapes.eight:
            low = weights.astype(shapes.dtype)
        plgpu.barrier_wait(v_ready.at[slot])
        values = wide(v_smem.at[slot])
        if shapes.eight:
            low = (weights * of_slots(scales_smem[1].at[slot], weights.shape)).astype(shapes.dtype)

        def weighted(acc_ref):
            plgpu.wgmma(acc_ref, low, values)

        acc = pl.run_state(weighted)(ACC.init(acc))
        pl.when(index + STAGES < stop)(lambda: fetch(index + STAGES))
        return acc, new_peak, total

    def row_vector(value: float):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    acc = plgpu.layout_cast(jnp.zeros((ROWS, shapes.head_dim), jnp.float32), plgpu.Layout.WGMMA)
    acc, peak, total = lax.fori_loop(start, stop, step, (acc, row_vector(LOWEST), row_vector(0.0)))
    sums_smem[0] = peak
    sums_smem[1] = total
    kept = pl.ds(0, shapes.rows)
    for first in range(0, shapes.head_dim, shapes.out_columns):
        columns = slice(first, first + shapes.out_columns)
        out_smem[...] = acc[:, columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[kept], out_ref.at[batch, head, split, :, columns])
        if first == 0:
            plgpu.copy_smem_to_gmem(sums_smem.at[0, kept], peak_ref.at[batch, head, split])
            plgpu.copy_smem_to_gmem(sums_smem.at[1, kept], total_ref.at[batch, head, split])
        plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames="shapes")
def decode(shapes: DecodeShapes, q, k, v, hidden, tiles, first, *scales) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Launches the kernel. q is [B, K, R, ROWS, H], `scales` those of keys and values in eight bits [B, K, S]; gives, for every share,
    the sum of weighted values [B, K, splits, rows, H], the maximum of the scores in units of log 2, and the sum of weights
    [B, K, splits, rows]."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    kept = (plgpu.TilingTransform((8, shapes.head_dim)), plgpu.SwizzleTransform(shapes.head_dim)) if shapes.eight else transforms
    stored, more = jnp.dtype(jnp.int8) if shapes.eight else shapes.dtype, 1 if shapes.eight else 0
    h, shares = shapes.head_dim, (shapes.batch, shapes.kv_heads, shapes.splits, shapes.rows)

    def body(*refs):
        _decode(shapes, *refs)

    launch = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((*shares, h), jnp.float32), *(jax.ShapeDtypeStruct(shares, jnp.float32) for _ in range(2))],
        scratch_types=[
            plgpu.SMEM((shapes.regions, ROWS, h), shapes.dtype, transforms=transforms),
            plgpu.SMEM((STAGES, TILE, h), stored, transforms=kept),
            plgpu.SMEM((STAGES, TILE, h), stored, transforms=kept),
            plgpu.SMEM((STAGES, TILE), jnp.float32),
            plgpu.SMEM((ROWS, shapes.out_columns), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=shapes.regions),
            plgpu.Barrier(num_arrivals=2 + more, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1 + more, num_barriers=STAGES),
            *(plgpu.SMEM((TILE, h), shapes.dtype, transforms=transforms) for _ in range(more)),
            *(plgpu.SMEM((STAGES, TILE), jnp.float32) for _ in range(2 * more)),
        ],
        grid=(shapes.splits, shapes.kv_heads, shapes.batch),
        grid_names=("split", "head", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return tuple(launch(q, k, v, hidden, tiles, first, *scales))
