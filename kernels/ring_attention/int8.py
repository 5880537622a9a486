"""Keys and values in eight bits: int8 numbers, and one float32 scale for every slot of every key-value head.

A scale is common to a whole row, so it leaves the products: q . (s k) = s (q . k), and a sum of w (s v) is one of (w s) v. Backends multiply
scores and weights by it, and convert the numbers where they are read, which is exact in bfloat16: no wide copy of the cache is made.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

LIMIT = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Stands where the keys or values [B, K, S, H] of a layer stood; also holds shapes, or shardings, of the two."""

    values: Any  # int8 [B, K, S, H]
    scale: Any  # float32 [B, K, S]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype


Rows = jax.Array | Int8Rows


def quantize_rows(rows: jax.Array) -> Int8Rows:
    """Each row [..., H] by its own largest number, to the nearest: an error of at most 1/254 of it. A row of zeros stays one."""
    wide = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(largest == 0, 1.0, largest / LIMIT)
    return Int8Rows(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)


def stored_as(cache: Rows, rows: jax.Array) -> Rows:
    """Rows in the form in which a cache keeps its own."""
    return quantize_rows(rows) if isinstance(cache, Int8Rows) else rows.astype(cache.dtype)


def widen(rows: Rows, dtype: Any) -> jax.Array:
    """The numbers that the rows stand for."""
    if isinstance(rows, Int8Rows):
        return (rows.values.astype(jnp.float32) * rows.scale[..., None]).astype(dtype)
    return rows.astype(dtype)
