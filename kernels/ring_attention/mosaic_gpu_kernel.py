"""Ring prefill on Hopper: two warpgroups compute, one fetches (the schedule of FlashAttention-3, arXiv 2407.08608).

A block takes 128 query rows of one head. It visits the tiles of cached keys that hold anything, region by region, with
the query's copy for that region, and then the chunk's own keys up to the diagonal. Validity comes as an additive row.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from svlm_jax.kernels.ring_attention.tiles import HIDDEN, LOWEST, TILE

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # public, as jax documents it
ROWS = 64  # query rows of a warpgroup
GROUPS = 2  # warpgroups that compute


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All that is static about one prefill."""

    batch: int
    regions: int
    length: int  # rows of the chunk, a multiple of GROUPS * ROWS
    heads: int
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    scale: float
    stages: int = 2


def load(ref, layout):
    """A whole reference in a layout. Before jax 0.11 `plgpu.load` wants an index, which it deprecates from then on."""
    index: tuple[tuple[()], ...] = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout)


def _prefill(shapes: Shapes, q_ref, k_ref, v_ref, hidden_ref, self_k_ref, self_v_ref, self_hidden_ref, tiles_ref, first_ref, *rest):
    out_ref, lse_ref, *scratch = rest
    q_smem, k_smem, v_smem, hidden_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
    block, head, batch = lax.axis_index("rows"), lax.axis_index("head"), lax.axis_index("batch")
    group = lax.axis_index("warpgroup")
    kv_head = lax.div(head, jnp.int32(shapes.heads // shapes.kv_heads))
    cached = first_ref[batch, shapes.regions]  # tiles of the cache to visit
    last_row = (block + 1) * (GROUPS * ROWS)
    own = lax.div(last_row + (TILE - 1), jnp.int32(TILE))  # tiles of the chunk up to the block's diagonal
    steps = cached + own

    def slot_of(step):
        return lax.rem(step, jnp.int32(shapes.stages))

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        q_own = q_smem.at[group]
        base = block * (GROUPS * ROWS) + group * ROWS

        def fetch_query(region: int):
            source = q_ref.at[batch, region, pl.ds(base, ROWS), head]
            plgpu.copy_gmem_to_smem(source, q_own, q_ready.at[group])
            plgpu.barrier_wait(q_ready.at[group])

        def step(index, carry, *, causal: bool):
            acc, peak, total = carry
            slot = slot_of(index)
            plgpu.barrier_wait(k_ready.at[slot])

            def product(scores):
                plgpu.wgmma(scores, q_own, k_smem.at[slot].transpose((1, 0)))
                take_turns()
                return scores[...]

            scores = pl.run_scoped(product, ACC((ROWS, TILE), jnp.float32))
            hidden = load(hidden_smem.at[slot], plgpu.Layout.WGMMA.reduce(0))
            plgpu.barrier_arrive(k_free.at[slot])
            scores = scores * (shapes.scale * math.log2(math.e)) + lax.broadcast_in_dim(hidden, scores.shape, [1])
            if causal:
                row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA) + base
                key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + (index - cached) * TILE
                scores = jnp.where(row >= key, scores, HIDDEN)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            decay = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
            acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
            total = total * decay + weights.sum(axis=1)
            low = weights.astype(shapes.dtype)
            acc, total, new_peak, low = lax.optimization_barrier((acc, total, new_peak, low))
            plgpu.barrier_arrive(turn)  # softmax done
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)  # tensor cores are free

            def weighted(acc_ref):
                plgpu.wgmma(acc_ref, low, v_smem.at[slot])

            acc = pl.run_state(weighted)(ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new_peak, total

        def row_vector(value: float):
            return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

        acc = plgpu.layout_cast(jnp.zeros((ROWS, shapes.head_dim), jnp.float32), plgpu.Layout.WGMMA)
        carry = (acc, row_vector(LOWEST), row_vector(0.0))
        pl.when(group == 1)(take_turns)
        for region in range(shapes.regions):
            fetch_query(region)
            start, stop = first_ref[batch, region], first_ref[batch, region + 1]
            carry = lax.fori_loop(start, stop, lambda i, c: step(i, c, causal=False), carry)
        # The chunk meets the last region's copy, which is here. Tiles that end before this warpgroup's rows need no mask
        clear = cached + lax.div(base, jnp.int32(TILE))
        carry = lax.fori_loop(cached, clear, lambda i, c: step(i, c, causal=False), carry)
        acc, peak, total = lax.fori_loop(clear, steps, lambda i, c: step(i, c, causal=True), carry)
        pl.when(group == 0)(take_turns)

        safe = jnp.where(total == 0.0, 1.0, total)
        acc /= lax.broadcast_in_dim(safe, acc.shape, [0])
        q_own[...] = acc.astype(shapes.dtype)
        lse_smem.at[group][...] = jnp.where(total == 0.0, -jnp.inf, peak * math.log(2) + jnp.log(safe))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_own, out_ref.at[batch, pl.ds(base, ROWS), head])
        plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[batch, head, pl.ds(base, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == GROUPS)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")

        def fetch(index):
            slot = slot_of(index)

            def copy(keys, values, hidden, start):
                rows = pl.ds(start, TILE)
                plgpu.copy_gmem_to_smem(keys.at[batch, kv_head, rows], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(hidden.at[batch, rows], hidden_smem.at[slot], k_ready.at[slot])
                pl.when(index >= shapes.stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(values.at[batch, kv_head, rows], v_smem.at[slot], v_ready.at[slot])

            pl.when(index >= shapes.stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))

            @pl.when(index < cached)
            def _():
                copy(k_ref, v_ref, hidden_ref, tiles_ref[batch, index] * TILE)

            @pl.when(index >= cached)
            def _():
                copy(self_k_ref, self_v_ref, self_hidden_ref, (index - cached) * TILE)

        @pl.loop(0, steps)
        def _(index):
            fetch(index)


@functools.partial(jax.jit, static_argnames="shapes")
def prefill(shapes: Shapes, q, k, v, hidden, self_k, self_v, self_hidden, tiles, first) -> tuple[jax.Array, jax.Array]:
    """Launches the kernel: out [B, T, N, H], lse float32 [B, N, T]. `hidden` [B, S] and `self_hidden` [B, T] are 0 or HIDDEN."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    rows, h = GROUPS * ROWS, shapes.head_dim

    def body(*refs):
        _prefill(shapes, *refs)

    launch = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((shapes.batch, shapes.length, shapes.heads, h), shapes.dtype),
            jax.ShapeDtypeStruct((shapes.batch, shapes.heads, shapes.length), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((GROUPS, ROWS, h), shapes.dtype, transforms=transforms),
            plgpu.SMEM((shapes.stages, TILE, h), shapes.dtype, transforms=transforms),
            plgpu.SMEM((shapes.stages, TILE, h), shapes.dtype, transforms=transforms),
            plgpu.SMEM((shapes.stages, TILE), jnp.float32),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=2, num_barriers=shapes.stages),
            plgpu.Barrier(num_barriers=shapes.stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=shapes.stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=shapes.stages),
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        grid=(shapes.heads, shapes.length // rows, shapes.batch),
        grid_names=("head", "rows", "batch"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return tuple(launch(q, k, v, hidden, self_k, self_v, self_hidden, tiles, first))
