"""Tensors of files in a bucket: of each, the bytes that are asked for are read, by several requests at once."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from svlm_jax.checkpoints.safetensors_file import FLOATS, Box, Mapped, Stored
from svlm_jax.errors import UserError
from svlm_jax.storage import Place, is_remote, read_range
from svlm_jax.types import Int

READERS = 16  # requests at once
REQUEST_BYTES = 8 << 20  # of one request at most
GAP_BYTES = 1 << 20  # ranges nearer to each other are read as one: a request takes longer than what lies between


class Fetched:
    """`safetensors_file.Mapped` for objects. Nothing is kept: a tensor is as large in memory as it is, but what was not read takes no pages."""

    one_by_one = False  # what is asked for again is read again

    def tensor(self, stored: Stored, shape: tuple[int, ...] | None = None, boxes: Sequence[Box] | None = None) -> np.ndarray:
        """The tensor as unsigned integers of its width, in `shape` (its own by default); what lies in none of `boxes` may be anything.

        Raises UserError where the object is no longer what its header said, or cannot be read.
        """
        shape = stored.shape if shape is None else shape
        boxes = [tuple(slice(0, n) for n in shape)] if boxes is None else boxes
        dtype = np.dtype(f"<u{FLOATS[stored.dtype].itemsize}")
        content = np.empty(stored.nbytes, np.uint8)
        parts = [part for start, end in byte_ranges(shape, boxes, dtype.itemsize, GAP_BYTES) for part in _cut(int(start), int(end))]

        def read(part: tuple[int, int]) -> None:
            start, end = part
            try:
                found = read_range(stored.file, stored.start + start, stored.start + end)
            except OSError as error:
                raise UserError(f"{stored.file} cannot be read ({error.strerror or error}): check that it is there, and run this again") from error
            if len(found) != end - start:
                raise UserError(f"{stored.file} was cut short while it was read: upload it again")
            content[start:end] = np.frombuffer(found, np.uint8)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, parts))
        return content.view(dtype).reshape(shape)

    def expect(self, stored: Stored) -> None:
        """Nothing is read ahead of what is asked for."""

    def release(self, stored: Stored) -> None:
        """The tensor goes where its last view goes."""


def reader(path: Place) -> Mapped | Fetched:
    """What reads safetensors files that are where `path` is."""
    return Fetched() if is_remote(path) else Mapped()


def byte_ranges(shape: tuple[int, ...], boxes: Sequence[Box], itemsize: int, gap: int) -> Int[np.ndarray, "ranges 2"]:
    """(start, end) of what has to be read of a row-major array for some boxes of it: in order, those less than `gap` bytes apart as one."""
    found = np.concatenate([np.zeros((0, 2), np.int64), *(_runs(shape, box) for box in boxes)]) * itemsize
    found = found[np.argsort(found[:, 0], kind="stable")]
    if not len(found):
        return found
    ends = np.maximum.accumulate(found[:, 1])
    new = np.flatnonzero(found[1:, 0] - ends[:-1] >= gap) + 1
    return np.stack([found[np.append(0, new), 0], ends[np.append(new - 1, len(found) - 1)]], axis=1)


def _runs(shape: tuple[int, ...], box: Box) -> Int[np.ndarray, "runs 2"]:
    """Stretches of neighbouring elements that make up one box, in elements."""
    sizes = [part.stop - part.start for part in box]
    if 0 in sizes:
        return np.zeros((0, 2), np.int64)
    cut = max((axis for axis, size in enumerate(shape) if sizes[axis] != size), default=0)  # behind this axis, all is whole
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    starts = np.zeros(1, np.int64)
    for axis in range(cut):
        starts = (starts[:, None] + np.arange(box[axis].start, box[axis].stop) * strides[axis]).reshape(-1)
    starts = starts + box[cut].start * strides[cut]
    return np.stack([starts, starts + sizes[cut] * strides[cut]], axis=1)


def _cut(start: int, end: int) -> list[tuple[int, int]]:
    """A range in requests."""
    return [(first, min(first + REQUEST_BYTES, end)) for first in range(start, end, REQUEST_BYTES)]
