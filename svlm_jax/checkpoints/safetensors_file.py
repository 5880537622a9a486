"""The safetensors format, read by byte range and written tensor by tensor: no file is ever in memory as a whole.

    8 bytes      length n of the header, little-endian
    n bytes      JSON: {name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {text: text}}
    the rest     the tensors' bytes, little-endian, row-major, without gaps

(https://github.com/huggingface/safetensors, "Format")
"""

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from svlm_jax.checkpoints.copying import COPIERS, fill
from svlm_jax.checkpoints.straight import PART, StraightFile
from svlm_jax.errors import UserError
from svlm_jax.storage import Place, read_range, size_of

FLOATS = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
Box = tuple[slice, ...]  # one slice an axis, with a start and a stop


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies. Its name is as the file spells it."""

    name: str
    dtype: str  # the format's word: BF16, F32, ...
    shape: tuple[int, ...]
    file: Place
    start: int  # bytes from the start of the file
    nbytes: int


def read_header(file: Place) -> dict[str, Stored]:
    """Every tensor of `file` by name. UserError where the file is cut short, or is not safetensors at all."""
    try:
        size, head = size_of(file), read_range(file, 0, 8)
        length = int.from_bytes(head, "little")
        if head == b"version ":
            raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` there, or download the file itself")
        if size < 8 or (length <= LONGEST_HEADER and size < 8 + length):
            raise UserError(f"{file} is cut short within its header ({size} bytes): download it again")
        if length > LONGEST_HEADER:
            raise UserError(f"{file} is not a safetensors file: download it again")
        header = json.loads(read_range(file, 8, 8 + length))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}): check that it exists and that you may read it") from error
    except ValueError as error:
        raise UserError(f"{file} has a header that is not JSON: download it again") from error
    try:
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, entry, file, 8 + length) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a header that does not follow the safetensors format: download it again") from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise UserError(f"{file} has a header whose byte ranges overlap or leave gaps at {tensor.name}: download it again")
        end += tensor.nbytes
    if size != end:
        state = "cut short" if size < end else "longer than its header says"
        raise UserError(f"{file} is {state} ({size} bytes of {end}): download it again")
    return tensors


def _stored(name: str, entry: dict, file: Place, data: int) -> Stored:
    start, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    if start < 0 or end < start or min(shape, default=0) < 0:
        raise ValueError(name)
    if entry["dtype"] in FLOATS and end - start != math.prod(shape) * FLOATS[entry["dtype"]].itemsize:
        raise ValueError(name)
    return Stored(name, str(entry["dtype"]), shape, file, data + start, end - start)


class Mapped:
    """Read-only views of tensors in files. Only the bytes that are touched are read, and `release` forgets them again."""

    one_by_one = True  # whether boxes of a tensor are better asked for one after the other than together

    def __init__(self):
        self._maps: dict[Place, mmap.mmap] = {}

    def tensor(self, stored: Stored, shape: tuple[int, ...] | None = None, boxes: Sequence[Box] | None = None) -> np.ndarray:
        """The tensor as unsigned integers of its width: NumPy copies those several times faster than its extension types.

        Args:
          shape: that it gets; its own by default.
          boxes: parts of that shape, the only ones that are going to be looked at; all of it by default.
        """
        shape, width = stored.shape if shape is None else shape, FLOATS[stored.dtype].itemsize
        if not stored.nbytes:
            return np.empty(shape, f"<u{width}")
        flat = np.frombuffer(self._map(stored.file), f"<u{width}", stored.nbytes // width, stored.start)
        return flat.reshape(shape)

    def expect(self, stored: Stored) -> None:
        """Says that the tensor is going to be looked at: the system begins to read it, in larger parts than a look at a page makes it read."""
        if hasattr(os, "posix_fadvise"):  # unlike a map's `madvise` it lets other threads run, and the system takes its time
            with open(stored.file, "rb") as source:
                os.posix_fadvise(source.fileno(), stored.start, stored.nbytes, os.POSIX_FADV_WILLNEED)

    def release(self, stored: Stored) -> None:
        """Takes the tensor's pages out of this process's memory; a later view reads them again."""
        first = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stored.start + stored.nbytes - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):  # Windows has none, and does without
            self._map(stored.file).madvise(mmap.MADV_DONTNEED, first, length)

    def _map(self, file: Place) -> mmap.mmap:
        if file not in self._maps:
            with open(file, "rb") as source:
                self._maps[file] = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to be written."""

    name: str
    dtype: str  # the format's word
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize


def write_file(file: Path, tensors: list[Outgoing], values: Iterable[np.ndarray], *, written: Callable[[int], None] | None = None) -> None:
    """Writes `tensors`, whose `values` are asked for one at a time and in the same order; `written` is told the bytes of each part.

    A value is any view whose elements are the tensor's in row-major order; it is laid out band by band.
    """
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as the format asks
    with StraightFile(file) as target, ThreadPoolExecutor(COPIERS) as copiers:
        target.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(tensors, values, strict=True):
            assert value.size == math.prod(tensor.shape) and value.dtype == FLOATS[tensor.dtype], (tensor, value.shape, value.dtype)
            for band in _bands(value):
                plain = f"u{band.itemsize}"  # plain integers, which are copied faster than NumPy's extension types
                fill(target.room(band.nbytes).view(plain).reshape(band.shape), band.view(plain), copiers)
                if written is not None:
                    written(band.nbytes)
            del value


def _bands(value: np.ndarray) -> Iterator[np.ndarray]:
    """The array in stretches of its first axis, of about PART bytes where that axis allows it."""
    if value.nbytes <= PART or not value.ndim:
        yield value
        return
    rows = max(1, PART * len(value) // value.nbytes)
    for start in range(0, len(value), rows):
        yield value[start : start + rows]
