"""Learned positions of patches: one square table, stretched over frames of any size by bilinear interpolation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.model.rope import patch_places
from svlm_jax.types import Array, Float, Int


class Taps(NamedTuple):
    """Where each patch of a grid reads the table, in processor order: the four rows around it, and their shares."""

    index: np.ndarray  # int32 [P, 4]
    share: np.ndarray  # float32 [P, 4], which sum to 1


@functools.lru_cache(maxsize=64)
def taps(side: int, height: int, width: int, merge: int) -> Taps:
    """Of a grid of height x width patches over a table of side x side rows: the corners of both fall together."""
    axes = []
    for place, size in zip(patch_places(height, width, merge), (height, width), strict=True):
        at = place * ((side - 1) / max(size - 1, 1))
        low = np.minimum(at.astype(np.int64), side - 1)
        high = np.minimum(low + 1, side - 1)
        axes.append((np.stack([low, high], -1), np.stack([1 - (at - low), at - low], -1)))
    (row, row_share), (column, column_share) = axes
    index = row[:, :, None] * side + column[:, None, :]
    share = row_share[:, :, None] * column_share[:, None, :]
    return Taps(index.reshape(-1, 4).astype(np.int32), share.reshape(-1, 4).astype(np.float32))


def stretched(table: Float[Array, "rows E"], height: int, width: int, merge: int) -> Float[Array, "P E"]:
    """The table's values at every patch of a grid, in processor order; the sums in float32."""
    with jax.named_scope("learned_positions"):
        index, share = taps(round(table.shape[0] ** 0.5), height, width, merge)
        return jnp.sum(table[index].astype(jnp.float32) * share[..., None], axis=1).astype(table.dtype)


def stretched_at(table: Float[Array, "rows E"], places: Int[Array, "... 2"], sizes: Int[Array, "... 2"]) -> Float[Array, "... E"]:
    """`stretched` where grids are data: the table's values at (row, column) `places` of grids of `sizes` (rows, columns) of patches."""
    with jax.named_scope("learned_positions"):
        side = round(table.shape[0] ** 0.5)
        steps, span = places * (side - 1), jnp.maximum(sizes - 1, 1)  # in whole numbers, so that no patch falls to the wrong side of a row
        low = jnp.minimum(steps // span, side - 1)
        high = jnp.minimum(low + 1, side - 1)
        share = ((steps - low * span) / span).astype(jnp.float32)
        total = jnp.zeros((*places.shape[:-1], table.shape[1]), jnp.float32)
        for row, row_share in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
            for column, column_share in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
                total = total + table[row * side + column].astype(jnp.float32) * (row_share * column_share)[..., None]
        return total.astype(table.dtype)
