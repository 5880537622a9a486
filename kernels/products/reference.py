"""The product in plain JAX: as one, in which compilers convert the weight where they read it, and tile by tile."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.backends import Unsupported

TILE_BYTES = 32 << 20  # of a converted tile
FEW_ROWS = 32  # up to which a product is a pass over the weight, and its conversion part of that
LANES = 128
LARGEST = 448.0  # that float8_e4m3fn holds
LEAST = 1e-30  # of a row's largest number: what a row of zeros is divided by must not be zero


def row_count(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])


def product_reference(x: jax.Array, values: jax.Array, scale: jax.Array, *, narrow: bool = False) -> jax.Array:
    """See `api.product`."""
    if not narrow:
        return _partial(x, values) * scale
    if row_count(x) <= FEW_ROWS:
        return _turned(x, values) * scale
    rounded, of_rows = rounded_rows(x)
    return _turned(rounded.astype(x.dtype), values) * jnp.expand_dims(of_rows, range(of_rows.ndim, of_rows.ndim + scale.ndim)) * scale


def rounded_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float8_e4m3fn in x's shape, float32 [...]): each row as numbers of eight bits, the largest of which is `LARGEST`, and their scale."""
    wide = x.astype(jnp.float32)
    # Compilers make a product with the inverse of a division by a constant; stated, so that numbers halfway between two are rounded the same everywhere
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), LEAST) * np.float32(1 / LARGEST)
    return (wide / scale[..., None]).astype(jnp.float8_e4m3fn), scale


def one_device(values: jax.Array) -> None:
    """Unsupported where the weight is cut over several: its tiles would be gathered."""
    size = jax.typeof(values).sharding.mesh.size
    if size > 1:
        raise Unsupported(f"takes weights of one device, not cut over {size}")


def many_rows(x: jax.Array) -> None:
    """Unsupported where there are few."""
    if row_count(x) <= FEW_ROWS:
        raise Unsupported(f"takes more than {FEW_ROWS} rows, not {row_count(x)}")


def check_tiles(x: jax.Array, values: jax.Array, *, narrow: bool) -> None:
    """Unsupported names the reason."""
    one_device(values)
    if narrow:
        raise Unsupported("rounds no rows to eight bits")
    many_rows(x)


def product_in_tiles(x: jax.Array, values: jax.Array, scale: jax.Array, *, narrow: bool = False) -> jax.Array:
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


def _turned(x: jax.Array, values: jax.Array) -> jax.Array:
    """As `_partial`, of a weight [..., inputs]."""
    return jnp.tensordot(x, values.astype(x.dtype), axes=(-1, -1), preferred_element_type=jnp.float32)


def _partial(x: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.tensordot(x, values.astype(x.dtype), axes=1, preferred_element_type=jnp.float32)
