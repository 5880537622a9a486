"""Frames as raw patches in the vision tower's window order (`model.vision.window_order`). NumPy only, uint8 throughout."""

import dataclasses
import functools

import numpy as np

from svlm_jax.config import VisionConfig
from svlm_jax.model.vision import window_order
from svlm_jax.types import Bool, Int, UInt8


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
    order, merge = window_order(vision, height, width), vision.spatial_merge_size
    columns = width // vision.merged_patch_size
    token, inner = np.divmod(order.source, merge**2)
    row, column = np.divmod(token, columns)[0] * merge + inner // merge, token % columns * merge + inner % merge
    shape = order.windows, order.window_patches
    coordinates = np.stack([row, column], -1).reshape(*shape, 2) * order.valid[..., None]
    tokens = np.where(order.valid.reshape(-1, merge**2)[:, 0], token.reshape(-1, merge**2)[:, 0], -1)
    return GridOrder(coordinates.astype(np.int32), order.valid, tokens.reshape(order.windows, -1).astype(np.int32), order.source)


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
    tall, wide = (rows, columns) if vision.window_size is None else (vision.window_size // side,) * 2
    run = np.dtype((np.void, patch * channels))  # colours of one row of a patch: copied as one element, as they lie together in both
    x = np.ascontiguousarray(frames).reshape(-1).view(run).reshape(count // depth, depth, rows, merge, patch, columns, merge)
    x = x.transpose(0, 2, 5, 3, 6, 1, 4)  # grid, row, column, row in merge, column in merge, frame, y
    shape = len(x), *order.valid.shape, vision.patch_features
    out = np.empty(shape, np.uint8) if out is None else out
    placed = out.reshape(-1).view(run).reshape(len(x), shape[1], tall, wide, *x.shape[3:])
    across = -(-columns // wide)
    for window in range(shape[1]):
        top, left = window // across * tall, window % across * wide
        part = x[:, top : top + tall, left : left + wide]
        placed[:, window, : part.shape[1], : part.shape[2]] = part
    if not order.valid.all():
        out[:, ~order.valid] = out[:, :1, 0]
    return out
