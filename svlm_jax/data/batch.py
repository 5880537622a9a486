"""What one training step is given: chunks of many videos, packed into rows of one shape.

Tokens and patches are packed apart. A row of T tokens holds chunks one after the other, told apart by segment ids. Patches
are kept in the vision tower's window order: a grid (a pair of frames) is a run of windows of p patches, and grids are packed
into G bins of W windows each, so that window attention is a reshape and full attention never looks beyond a bin.
"""

import dataclasses

import jax

from svlm_jax.data.eviction import Eviction
from svlm_jax.types import Bool, Int, UInt8

IGNORED = -100  # the label of a token that the loss leaves out, as PyTorch's cross_entropy has it
PADDING = 0  # the segment of tokens, and the grid of windows, that are none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows. All arrays may be NumPy's or a device's."""

    tokens: Int[jax.Array, "B T"]
    labels: Int[jax.Array, "B T"]  # each token's own id where it is to be predicted (from the tokens before it), else IGNORED
    positions: Int[jax.Array, "B T 3"]  # (time, row, column) in units of 1/unit, from 0 in every segment
    segments: Int[jax.Array, "B T"]  # 1, 2, ... in order: tokens see their own segment only; PADDING behind the last, and between those that evict
    patches: UInt8[jax.Array, "B G W p features"]  # raw pixels (frame, y, x, colour) of one patch: in the order of frames, which is fast to copy
    patch_coordinates: Int[jax.Array, "B G W p 2"]  # (row, column) of a patch in its grid
    patch_valid: Bool[jax.Array, "B G W p"]  # false at the right and bottom edges of grids, and in windows that are none
    grids: Int[jax.Array, "B G W"]  # 1, 2, ... within a bin: full attention stays within one grid; PADDING
    places: Int[jax.Array, "B G W p/4"]  # row of T where each merged token goes; T for those that are none
    eviction: Eviction | None = None  # where samples have a window: what each token sees of its segment
