"""Learned positions of patches: one square table, stretched over frames of any size by bilinear interpolation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.model.rope import patch_places
from svlm_jax.types import Array, Float


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
