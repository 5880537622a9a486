"""The vision towers over packed grids (`data.batch`): bins of windows that hold grids of any size, one after the other.

The same parameters and equations as `model.vision`; what differs is where a patch stands, which is data here, and who sees whom:
windows see themselves, and full attention stays within a grid, told by its number in the bin.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.config import VisionConfig
from svlm_jax.model.layers import once
from svlm_jax.model.learned_positions import stretched_at
from svlm_jax.model.rope import Rotation, shift_rotation
from svlm_jax.model.vision import PIXELS, Features, VisionBlock, VisionTower, masked_attention
from svlm_jax.types import Array, Bool, Float, Int, UInt8

THETA = 10_000.0  # of rotary positions in the tower, which no config.json states
# Attention among the S patches of a bin, [bins, S, N, H] each: a patch sees those of its own segment
BinAttention = Callable[[Array, Array, Array, Int[Array, "bins S"]], Array]
Block = Callable[[VisionBlock, Array, Array, Array, Array, Array], Array]  # module, x, cos, sin, valid, segments


def normalised(config: VisionConfig, patches: UInt8[Array, "bins W p features"]) -> Float[Array, "bins W p features"]:
    """Raw pixels (frame, y, x, colour) as the tower takes them, float32."""
    size = config.temporal_patch_size * config.patch_size**2
    mean, deviation = (np.tile(a, size) for a in PIXELS[config.pixels])
    return (patches.astype(jnp.float32) * np.float32(1 / 255) - mean) / deviation


def patch_rotation(config: VisionConfig, coordinates: Int[Array, "bins W p 2"]) -> Rotation:
    """Half of the pairs turn with the row, half with the column: [bins, W, p, 1, head_dim / 2]."""
    row, column = (shift_rotation(coordinates[..., i], head_dim=config.head_dim // 2, theta=THETA, denominator=1) for i in (0, 1))
    return Rotation(*(jnp.concatenate(pair, -1)[..., None, :] for pair in zip(row, column, strict=True)))


def grid_sizes(coordinates: Int[Array, "bins W p 2"], grids: Int[Array, "bins W"]) -> Int[Array, "bins W 2"]:
    """(rows, columns) of patches of the grid that each window belongs to: one more than its patches' largest coordinates."""
    most = coordinates.max(axis=2) + 1
    largest = jax.vmap(lambda most, grids: jax.ops.segment_max(most, grids, num_segments=most.shape[0] + 1))(most, grids)
    return jnp.take_along_axis(largest, grids[..., None], axis=1)


def plain_bin_attention(q: Array, k: Array, v: Array, segments: Int[Array, "bins S"]) -> Array:
    """`BinAttention` that writes all scores of a bin."""
    mask = segments[:, None, None, :, None] == segments[:, None, None, None, :]
    return masked_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]


def plain_window_attention(q: Array, k: Array, v: Array, segments: Int[Array, "windows p"]) -> Array:
    """`BinAttention` within windows: what is no padding is of one segment."""
    return masked_attention(q[:, None], k[:, None], v[:, None], segments[:, None, None, None, :] > 0)[:, 0]


def _run_block(
    block: VisionBlock, x: Array, cos: Array, sin: Array, valid: Array, segments: Array, *, full: bool, attention: BinAttention
) -> Array:
    """`attention` is over bins in blocks that see whole grids, over windows in the others."""
    count = x.shape[0] if full else x.shape[0] * x.shape[1]
    kinds = (segments if full else valid.astype(jnp.int32)).reshape(count, -1)

    def attend(q: Array, k: Array, v: Array) -> Array:
        flat = (count, -1, *q.shape[3:])
        return attention(q.reshape(flat), k.reshape(flat), v.reshape(flat), kinds).reshape(q.shape)

    return block(x, Rotation(cos, sin), None, full=full, attend=attend)


def packed_features(
    tower: VisionTower,
    patches: UInt8[Array, "bins W p features"],
    coordinates: Int[Array, "bins W p 2"],
    valid: Bool[Array, "bins W p"],
    grids: Int[Array, "bins W"],
    *,
    attention: BinAttention = plain_bin_attention,
    windows: BinAttention = plain_window_attention,
    wrap: Callable[[Block], Block] = lambda run: run,
) -> Features:
    """What the decoder is given of every 2x2 block of patches, a bin a row, in window order; what is not valid comes out as anything finite.

    Args:
      coordinates: (row, column) of each patch in its grid.
      grids: which grid of the bin a window belongs to; 0 for windows that are none.
      attention: of the blocks that see whole grids.
      windows: of the others, within each window.
      wrap: what is put around each block, such as recomputing it in the backward pass.
    """
    c = tower.config
    with jax.named_scope("patchify"):
        x = normalised(c, patches).astype(tower.patch_embed.dtype)
        # The tower's features are (colour, frame, y, x)
        embed = tower.patch_embed[...].reshape(c.in_channels, -1, c.hidden_size).swapaxes(0, 1).reshape(-1, c.hidden_size)
        x = jnp.einsum("bwpf,fe->bwpe", x, embed)
        if tower.patch_embed_bias is not None:
            x = x + tower.patch_embed_bias[...]
        if tower.positions is not None:
            sizes = jnp.broadcast_to(grid_sizes(coordinates, grids)[:, :, None], coordinates.shape)
            x = x + stretched_at(tower.positions[...], coordinates, sizes)
        rotation = patch_rotation(c, coordinates)
        segments = jnp.where(valid, grids[..., None], 0).reshape(valid.shape[0], -1)
    run_block = once(_run_block, "full", "attention")
    deep = []
    for index, block in enumerate(tower.blocks):
        full = c.sees_all(index)

        def run(block, x, cos, sin, valid, segments, full=full):
            return run_block(block, x, cos, sin, valid, segments, full=full, attention=attention if full else windows)

        x = wrap(run)(block, x, *rotation, valid, segments)
        if index in c.deepstack_blocks:
            deep.append(tower.deepstack[len(deep)].merge(x, slice(None)))
    return Features(tower.merge(x, slice(None)), tuple(deep))
