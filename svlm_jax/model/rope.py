"""Rotary positions: exact rotations at any integer coordinate, on three axes (M-RoPE, arXiv 2409.12191, section 2.1).

Coordinates are int32 in units of 1/q (q = `denominator`). A rotation is the complex product of four table entries, one
for each base-256 digit of the coordinate; the tables are computed in float64 on the host and stored in float32, so the
error stays near 3e-7 at every coordinate, where float32 angles are already wrong in the fourth digit at 1,000.
The top digit is read as signed (two's complement), so negative coordinates rotate backwards.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.types import Array, Float, Int

DIGITS, BASE = 4, 256


class Rotation(NamedTuple):
    """One plane rotation for each of H/2 frequency pairs; pair i joins features i and i + H/2. Always float32."""

    cos: Float[Array, "... pairs"]
    sin: Float[Array, "... pairs"]


@functools.lru_cache(maxsize=32)
def rotation_table(head_dim: int, theta: float, denominator: int) -> np.ndarray:
    """[2, 4 * 256, H/2] float32: cos and sin of every digit's angle."""
    inverse_frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    digit = np.arange(BASE, dtype=np.float64)
    signed = np.where(digit < BASE // 2, digit, digit - BASE)
    values = np.stack([digit, digit * BASE, digit * BASE**2, signed * BASE**3])
    angle = (values / denominator)[..., None] * inverse_frequency
    return np.stack([np.cos(angle), np.sin(angle)]).reshape(2, DIGITS * BASE, -1).astype(np.float32)


def _rotation(table: np.ndarray, coordinate: Int[Array, "..."], pairs: slice | np.ndarray) -> Rotation:
    digits = [((coordinate >> (8 * k)) & (BASE - 1)) + k * BASE for k in range(DIGITS)]
    cos_table, sin_table = (jnp.asarray(part[:, pairs]) for part in table)
    cos, sin = cos_table[digits[0]], sin_table[digits[0]]
    for digit in digits[1:]:
        c, s = cos_table[digit], sin_table[digit]
        cos, sin = cos * c - sin * s, cos * s + sin * c
    return Rotation(cos, sin)


def shift_rotation(coordinate: Int[Array, "..."], *, head_dim: int, theta: float, denominator: int) -> Rotation:
    """The rotation by an equal shift of all three axes, [..., H/2]."""
    with jax.named_scope("rotation"):
        return _rotation(rotation_table(head_dim, theta, denominator), coordinate, slice(None))


def mrope_rotation(coordinate: Int[Array, "... 3"], *, axes: tuple[int, ...], theta: float, denominator: int) -> Rotation:
    """The rotation at a (time, row, column) coordinate, [..., H/2]; `axes` says which of the three turns each pair."""
    with jax.named_scope("rotation"):
        table = rotation_table(2 * len(axes), theta, denominator)
        pairs = [np.flatnonzero(np.equal(axes, axis)) for axis in range(3)]
        parts = [_rotation(table, coordinate[..., axis], turned) for axis, turned in enumerate(pairs)]
        rotation = Rotation(*(jnp.concatenate(part, -1) for part in zip(*parts, strict=True)))
        place = np.argsort(np.concatenate(pairs))
        if (place == np.arange(len(axes))).all():  # one axis after the other
            return rotation
        return Rotation(*(part[..., place] for part in rotation))


def rotate(x: Float[Array, "... H"], rotation: Rotation) -> Float[Array, "... H"]:
    """x turned by `rotation` (broadcast over heads by the caller); computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def clip_offsets(grid: tuple[int, int, int], temporal_step: Fraction, denominator: int) -> np.ndarray:
    """int32 [t * h * w, 3]: coordinates of a clip's tokens after the clip's base, in units of 1/q.

    `grid` is (t, h, w) in merged patches: the token at (a, b, c) stands at base + (a * step, b, c).
    """
    t, h, w = np.meshgrid(*(np.arange(n, dtype=np.int32) for n in grid), indexing="ij")
    return np.stack([t * int(temporal_step * denominator), h * denominator, w * denominator], -1).reshape(-1, 3)


def clip_extent(grid: tuple[int, int, int], temporal_step: Fraction, denominator: int) -> int:
    """Positions that a clip's patches take, in units of 1/q: text resumes at the largest position used plus one."""
    return int(clip_offsets(grid, temporal_step, denominator).max()) + denominator


def patch_places(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch of a grid, [h * w] each, in processor order (merged blocks of merge x merge)."""
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    row, column = (a.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for a in (row, column))
    return row, column


def vision_rotation(height: int, width: int, merge: int, head_dim: int, theta: float = 10_000.0) -> Rotation:
    """Rotary positions of one grid of patches, [h * w, head_dim / 2], in processor order.

    Half of the pairs turn with the row, half with the column.
    """
    row, column = patch_places(height, width, merge)
    inverse_frequency = theta ** (-np.arange(0, head_dim // 2, 2, dtype=np.float64) / (head_dim // 2))
    angle = np.concatenate([row[:, None] * inverse_frequency, column[:, None] * inverse_frequency], -1)
    return Rotation(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
