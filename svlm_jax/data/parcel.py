"""The pixels of a sample on their way from a worker process: a file in memory, which is read straight to where they belong.

Memory that is shared would have to be mapped for each sample and taken off again, and Python lets no other thread run meanwhile. Reading a
file does.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import tempfile
from collections.abc import Iterable
from multiprocessing import resource_tracker

import numpy as np

from svlm_jax.types import UInt8

MEMORY = "/dev/shm"  # of Linux: what is written there is in memory, and a full one is no error, as there is room elsewhere


@dataclasses.dataclass(frozen=True)
class Parcel:
    """An array of bytes in a file of its own. Who reads it drops it."""

    path: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, parts: Iterable[UInt8[np.ndarray, "..."]]) -> None:
        """Fills contiguous arrays with its bytes, one after the other."""
        with open(self.path, "rb", buffering=0) as file:
            for part in parts:
                left = part.data.cast("B")
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise EOFError(f"{self.path} is shorter than what was written")
                    left = left[count:]

    def drop(self) -> None:
        os.unlink(self.path)
        _forget(self.path)


class Post:
    """Makes parcels in worker processes; `clear` in the process that opened the post takes away those that nobody has read."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.prefix = f"svlm-{os.getpid()}-{next(Post._numbers)}-"

    def pack(self, array: UInt8[np.ndarray, "..."]) -> Parcel:
        """Writes an array down: into memory, or into the folder for temporary files where that is full."""
        name = f"{self.prefix}{os.getpid()}-{next(Post._numbers)}"
        for folder in _folders():
            path = os.path.join(folder, name)
            try:
                _write(path, array)
            except OSError as error:
                if error.errno != errno.ENOSPC or folder != MEMORY:
                    raise
            else:
                return Parcel(path, array.shape)
        raise AssertionError("a folder takes it or raises")

    def clear(self) -> None:
        for folder in _folders():
            for name in os.listdir(folder):
                if name.startswith(self.prefix):
                    with contextlib.suppress(FileNotFoundError):  # it has been read meanwhile
                        Parcel(os.path.join(folder, name), ()).drop()


def _folders() -> list[str]:
    return [*([MEMORY] if os.access(MEMORY, os.W_OK) else []), tempfile.gettempdir()]


def _write(path: str, array: np.ndarray) -> None:
    with open(path, "xb", buffering=0, opener=_private) as file:
        _remember(path)
        left = np.ascontiguousarray(array).data.cast("B")
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            Parcel(path, ()).drop()
            raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # the folder is everybody's


# Memory outlives a process that is killed, unless Python's tracker of shared memory knows of it


def _remember(path: str) -> None:
    if os.path.dirname(path) == MEMORY:
        resource_tracker.register(f"/{os.path.basename(path)}", "shared_memory")


def _forget(path: str) -> None:
    if os.path.dirname(path) == MEMORY:
        resource_tracker.unregister(f"/{os.path.basename(path)}", "shared_memory")
