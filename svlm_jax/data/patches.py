"""Frames as raw patches, in windows. NumPy only, uint8 throughout.

The windows are those of the vision tower (`model.vision.window_order`). Where it has none, a grid is cut into as many as it takes of
TOKENS tokens each, row by row: all blocks see all of a grid then, so that windows are no more than what bins are filled with.
"""

import dataclasses
import functools

import numpy as np

from svlm_jax.config import VisionConfig
from svlm_jax.model.vision import window_order
from svlm_jax.types import Bool, Int, UInt8

TOKENS = 16  # of a window, where the tower has none; as many as one of Qwen2.5-VL's


def window_tokens(vision: VisionConfig) -> int:
    """Merged tokens of a window."""
    return TOKENS if vision.window_size is None else (vision.window_size // vision.merged_patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class GridOrder:
    """What is the same for every grid (pair of frames) of one size: w windows of p patches, m of them merged to a token."""

    coordinates: Int[np.ndarray, "w p 2"]  # (row, column) of a patch in its grid; of padding 0
    valid: Bool[np.ndarray, "w p"]
    tokens: Int[np.ndarray, "w merged"]  # token, counted by rows, in each place of p / m; of padding -1
    source: Int[np.ndarray, "places"]  # patch in processor order in each place; padding repeats patch 0


@functools.lru_cache(maxsize=64)
def grid_order(vision: VisionConfig, height: int, width: int) -> GridOrder:
    """The order of a frame of height x width pixels (multiples of a merged patch)."""
    merge, columns = vision.spatial_merge_size, width // vision.merged_patch_size
    source, valid = _source(vision, height, width)
    token, inner = np.divmod(source, merge**2)
    row, column = np.divmod(token, columns)[0] * merge + inner // merge, token % columns * merge + inner % merge
    coordinates = np.stack([row, column], -1).reshape(*valid.shape, 2) * valid[..., None]
    tokens = np.where(valid.reshape(-1, merge**2)[:, 0], token.reshape(-1, merge**2)[:, 0], -1)
    return GridOrder(coordinates.astype(np.int32), valid, tokens.reshape(len(valid), -1).astype(np.int32), source)


def _source(vision: VisionConfig, height: int, width: int) -> tuple[Int[np.ndarray, "places"], Bool[np.ndarray, "w p"]]:
    """(patch in processor order in each place, which places are no padding)."""
    if vision.window_size is not None:
        order = window_order(vision, height, width)
        return order.source, order.valid
    merged = vision.spatial_merge_size**2
    count, length = height * width // vision.patch_size**2, TOKENS * merged
    place = np.arange(-(-count // length) * length, dtype=np.int32)
    return np.where(place < count, place, 0), (place < count).reshape(-1, length)


def window_patches(
    frames: UInt8[np.ndarray, "F height width 3"], vision: VisionConfig, out: UInt8[np.ndarray, "grids w p features"] | None = None
) -> UInt8[np.ndarray, "grids w p features"]:
    """Frames as patches (frame, y, x, colour) in window order, in `out` if given; padding repeats patch 0. An odd last frame is repeated."""
    patch, merge, depth = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    if len(frames) % depth:
        frames = np.concatenate([frames, np.repeat(frames[-1:], depth - len(frames) % depth, axis=0)])
    count, height, width, channels = frames.shape
    order, side = grid_order(vision, height, width), vision.merged_patch_size
    rows, columns = height // side, width // side
    run = np.dtype((np.void, patch * channels))  # colours of one row of a patch: copied as one element, as they lie together in both
    x = np.ascontiguousarray(frames).reshape(-1).view(run).reshape(count // depth, depth, rows, merge, patch, columns, merge)
    x = x.transpose(0, 2, 5, 3, 6, 1, 4)  # grid, row, column, row in merge, column in merge, frame, y
    shape = len(x), *order.valid.shape, vision.patch_features
    out = np.empty(shape, np.uint8) if out is None else out
    flat = out.reshape(-1).view(run)
    if vision.window_size is None:
        flat.reshape(len(x), -1, *x.shape[3:])[:, : rows * columns].reshape(x.shape)[...] = x
    else:
        tall = vision.window_size // side
        placed = flat.reshape(len(x), shape[1], tall, tall, *x.shape[3:])
        across = -(-columns // tall)
        for window in range(shape[1]):
            top, left = window // across * tall, window % across * tall
            part = x[:, top : top + tall, left : left + tall]
            placed[:, window, : part.shape[1], : part.shape[2]] = part
    if not order.valid.all():
        out[:, ~order.valid] = out[:, :1, 0]
    return out
