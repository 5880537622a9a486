"""The product in plain JAX: as one, in which compilers convert the weight where they read it, and tile by tile."""

import math

import jax
import jax.numpy as jnp

from svlm_jax.kernels.backends import Unsupported

TILE_BYTES = 32 << 20  # of a converted tile
FEW_ROWS = 32  # up to which a product is a pass over the weight, and its conversion part of that
LANES = 128


def product_reference(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """See `api.product`."""
    return _partial(x, values) * scale


def one_device(values: jax.Array) -> None:
    """Unsupported where the weight is cut over several: its tiles would be gathered."""
    size = jax.typeof(values).sharding.mesh.size
    if size > 1:
        raise Unsupported(f"takes weights of one device, not cut over {size}")


def check_tiles(x: jax.Array, values: jax.Array) -> None:
    """Unsupported names the reason."""
    one_device(values)
    rows = math.prod(x.shape[:-1])
    if rows <= FEW_ROWS:
        raise Unsupported(f"takes more than {FEW_ROWS} rows, not {rows}")


def product_in_tiles(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """See `api.product`. No more of the weight is in a wider type at once than a tile, at most half of it.

    A library's matrix product converts nothing: for it a compiler would else make a copy of the whole weight first. Tiles are cut along the
    longer side, so that each is a large product, and one is converted after the other.
    """
    kept, cut = x.shape[:-1], scale.shape
    x, values = x.reshape(-1, x.shape[-1]), values.reshape(values.shape[0], -1)
    inputs, outputs = values.shape
    count = max(2, -(-inputs * outputs * x.dtype.itemsize // TILE_BYTES))
    size = -(-max(inputs, outputs) // (count * LANES)) * LANES
    if outputs >= inputs:
        columns = []
        for first in range(0, outputs, size):
            columns.append(_partial(x, values[:, first : first + size]))
            values, columns[-1] = jax.lax.optimization_barrier((values, columns[-1]))
        out = jnp.concatenate(columns, axis=1)
    else:
        out = jnp.zeros((x.shape[0], outputs), jnp.float32)
        for first in range(0, inputs, size):
            out += _partial(x[:, first : first + size], values[first : first + size])
            values, out = jax.lax.optimization_barrier((values, out))
    return out.reshape(*kept, *cut) * scale


def _partial(x: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.tensordot(x, values.astype(x.dtype), axes=1, preferred_element_type=jnp.float32)
