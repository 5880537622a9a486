"""Mosaic TPU backend, host side: which calls it takes, how the cache is cut into blocks, and what it hands to the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.backends import Unsupported
from svlm_jax.kernels.ring_attention.api import Regions
from svlm_jax.kernels.ring_attention.int8 import Int8Rows, Rows
from svlm_jax.kernels.ring_attention.tiles import TILE

MAX_BLOCK = 2048  # slots
STEP_SLOTS = 256  # the fixed cost of a grid step, as the slots that are read in that time
ROWS = 512  # query rows of a tile, at most
OWN = 512  # keys of one of the chunk's blocks, at most
BUFFER_BYTES = 8 << 20  # keys and values on their way, two blocks of each


def check(q: jax.Array, k: Rows, self_k: jax.Array | None) -> None:
    """Unsupported names the reason."""
    del self_k
    if q.dtype not in (jnp.bfloat16, jnp.float32) or (q.dtype != k.dtype and not isinstance(k, Int8Rows)):
        raise Unsupported(f"takes bfloat16 or float32 over their own kind or int8, not {q.dtype} queries over {k.dtype} keys")
    if q.shape[-1] != 128:
        raise Unsupported(f"takes heads of 128, not {q.shape[-1]}")


@functools.lru_cache(maxsize=64)
def cache_blocks(regions: Regions) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """How the cache is cut into blocks of one region each; a region's last block reaches into its neighbour, whose slots it hides.

    Returns:
      Slots of a block; int32 [blocks] the tile at which each begins, and its region; bool [blocks, block] which slots are the region's.
    """
    slots = max(regions[-1][1], TILE)

    def counts(block: int) -> list[int]:
        return [-(-(stop - first) // block) for first, stop in regions]

    sizes = [size for size in (TILE << i for i in range(5)) if size <= min(slots, MAX_BLOCK)]
    block = min(sizes, key=lambda size: sum(counts(size)) * (size + STEP_SLOTS))
    starts, owners, inside = [], [], []
    for region, ((first, stop), count) in enumerate(zip(regions, counts(block), strict=True)):
        for index in range(count):
            begin = min(first + index * block, slots - block)
            slot = begin + np.arange(block)
            starts.append(begin // TILE)
            owners.append(region)
            inside.append((slot >= first + index * block) & (slot < stop))
    if not starts:  # no cache at all: the kernel is given one block, which it does not visit
        starts, owners, inside = [0], [0], [np.zeros(block, bool)]
    return block, np.asarray(starts, np.int32), np.asarray(owners, np.int32), np.stack(inside)


def prepare(valid: jax.Array, regions: Regions) -> tuple[jax.Array, ...]:
    """The blocks to visit: order int32 [B, blocks] (the last one repeated when no more hold anything), their count int32 [B],
    and which of their slots count, float32 [B, blocks, 1, block]."""
    block, starts, _, inside = cache_blocks(regions)
    if not valid.shape[1]:
        valid = jnp.zeros((valid.shape[0], block), jnp.bool_)
    held = jnp.stack([valid[:, start * TILE : start * TILE + block] for start in starts], axis=1) & inside
    any_held = jnp.any(held, axis=-1)
    count = jnp.sum(any_held, axis=1, dtype=jnp.int32)
    # The place of each block among those that hold anything, and back: without a sort
    place = jnp.cumsum(any_held, axis=1, dtype=jnp.int32) - 1
    step = jnp.minimum(jnp.arange(len(starts))[:, None], jnp.maximum(count - 1, 0)[:, None, None])  # [B, steps, 1]
    chosen = any_held[:, None] & (place[:, None] == step)
    order = jnp.sum(chosen * np.arange(len(starts), dtype=np.int32), axis=-1, dtype=jnp.int32)
    return order, count, held[:, :, None].astype(jnp.float32)


def ring_attention_mosaic_tpu(
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
    """See `api.ring_attention`. `plan` is what `prepare` made of the same `valid` and `regions`."""
    from svlm_jax.kernels.ring_attention.mosaic_tpu_kernel import Shapes, attention

    check(q, k, self_k)
    batch, copies, length, heads, head_dim = q.shape
    kv_heads, group, count = k.shape[1], heads // k.shape[1], length * heads // k.shape[1]
    order, visited, held = prepare(valid, regions) if plan is None else plan
    block, starts, owners, _ = cache_blocks(regions)
    scales: tuple[jax.Array, ...] = ()
    if isinstance(k, Int8Rows) and isinstance(v, Int8Rows):
        k, v, scales = k.values, v.values, (k.scale, v.scale)
    if not k.shape[2]:
        scales = tuple(jnp.zeros((batch, kv_heads, block), jnp.float32) for _ in scales)
        k, v = (jnp.zeros((batch, kv_heads, block, head_dim), k.dtype) for _ in range(2))
    row_tiles = -(-count // ROWS)
    rows = _up(-(-count // row_tiles), 16 if row_tiles == 1 else 128)
    own, own_blocks = 0, 0
    fresh: tuple[jax.Array, ...] = ()
    if self_k is not None and self_v is not None and self_valid is not None:
        own_blocks = -(-length // OWN)
        own = _up(-(-length // own_blocks), 16 if own_blocks == 1 else 128)
        pad = own_blocks * own - length
        fresh = (
            *(jnp.pad(a, ((0, 0), (0, 0), (0, pad), (0, 0))) for a in (self_k, self_v)),
            jnp.pad(self_valid, ((0, 0), (0, pad)))[:, None].astype(jnp.float32),
        )
    # [B, R, K, (t, g), H]
    queries = q.reshape(batch, copies, length, kv_heads, group, head_dim).transpose(0, 1, 3, 2, 4, 5).reshape(batch, copies, kv_heads, count, head_dim)
    shapes = Shapes(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        regions=copies,
        head_dim=head_dim,
        row_tiles=row_tiles,
        rows=rows,
        heads=_heads_of_a_step(kv_heads, rows, block * head_dim * k.dtype.itemsize),
        blocks=len(starts),
        block=block,
        own_blocks=own_blocks,
        own=own,
        dtype=jnp.dtype(q.dtype),
        scale=head_dim**-0.5 if scale is None else scale,
        eight=bool(scales),
    )
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, row_tiles * rows - count), (0, 0)))
    steps = (order, visited, jnp.asarray(starts), jnp.asarray(owners), held)
    out, lse = attention(shapes, steps, queries, k, v, scales, *fresh)

    def back(a: jax.Array) -> jax.Array:
        """[B, K, (t, g), ...] as [B, T, N, ...]."""
        a = a[:, :, :count].reshape(batch, kv_heads, length, group, *a.shape[3:])
        return jnp.moveaxis(a, 1, 2).reshape(batch, length, heads, *a.shape[4:])

    return back(out), back(lse[:, :, 0])


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _heads_of_a_step(kv_heads: int, rows: int, block_bytes: int) -> int:
    """As many as fit, and at most half of them: chips with two cores work on two steps at a time."""
    fits = [n for n in range(1, max(1, kv_heads // 2) + 1) if kv_heads % n == 0 and n * rows <= ROWS and 4 * n * block_bytes <= BUFFER_BYTES]
    return max(fits, default=1)
