"""What the kernels share: tiles of slots that hold anything, which they visit region by region, and how a slot is hidden."""

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.ring_attention.api import Regions

TILE = 128
HIDDEN = -1e30  # the score of a slot that does not count, or what is added to it
LOWEST = -1e29  # where a running maximum starts: above HIDDEN, so that hidden keys weigh exactly 0


def visited_tiles(valid: jax.Array, regions: Regions) -> tuple[jax.Array, jax.Array]:
    """The tiles with a valid slot, in order, and where each region's begin.

    Args:
      valid: bool [B, S].
      regions: static (start, stop) pairs, multiples of 128.

    Returns:
      int32 [B, S / 128]: tile numbers, region by region, those without a valid slot behind all others.
      int32 [B, R + 1]: the first entry of every region, and the number of all.
    """
    batch, slots = valid.shape
    held = jnp.any(valid.reshape(batch, slots // TILE, TILE), axis=-1)
    order = jnp.argsort(~held, axis=1, stable=True).astype(jnp.int32)
    region_of = np.zeros((len(regions), slots // TILE), bool)
    for index, (start, stop) in enumerate(regions):
        region_of[index, start // TILE : stop // TILE] = True
    counts = jnp.sum(held[:, None] & region_of, axis=-1, dtype=jnp.int32)
    return order, jnp.pad(jnp.cumsum(counts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
