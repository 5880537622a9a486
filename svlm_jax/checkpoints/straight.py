"""A file that is written once, past the system's cache: what will not be read soon need not be copied there first.

Conversions are bound by how often their bytes are copied. Linux takes large writes straight from memory (O_DIRECT) where place in the file, place
in memory and length are multiples of a page; file systems that cannot do so say it at the first such write, and are written to as ever.
"""

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from svlm_jax.types import UInt8

PART = 64 << 20  # bytes written at once
ALIGNED = 4096  # bytes; that many suit any disk
REFUSED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}  # what file systems say to O_DIRECT that do not have it


class StraightFile:
    """Bytes one after the other: each part is written while the next one is filled.

    As a context, it ends with all bytes on the disk, or with what went wrong. Raises OSError as any file does.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._straight = self._open_straight(path)
        except OSError:
            os.close(self._file)
            raise
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._parts = [_pages(PART + ALIGNED), _pages(PART + ALIGNED)]  # one is filled, one is written; less than a page is left of the one before
        self._used = 0  # bytes of the first
        self._offset = 0  # of its first byte in the file

    def room(self, size: int) -> UInt8[np.ndarray, "size"]:
        """The next bytes of the file, to be filled before the next call."""
        if self._used + size > len(self._parts[0]):
            self._send()
            if self._used + size > len(self._parts[0]):
                self._grow(self._used + size)
        place = self._parts[0][self._used : self._used + size]
        self._used += size
        return place

    def write(self, data: bytes) -> None:
        self.room(len(data))[:] = np.frombuffer(data, np.uint8)

    def __enter__(self) -> "StraightFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._send()
                self._wait()
                _write(self._file, self._parts[0][: self._used], self._offset)  # less than a page
                os.fsync(self._file)
        finally:
            self._writer.shutdown()
            os.close(self._file)
            if self._straight is not None:
                os.close(self._straight)

    @staticmethod
    def _open_straight(path: Path) -> int | None:
        try:
            return os.open(path, os.O_WRONLY | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return None

    def _send(self) -> None:
        """Has all whole pages written; what is left begins the other part."""
        whole = self._used // ALIGNED * ALIGNED
        self._wait()
        full, other = self._parts
        rest = self._used - whole
        other[:rest] = full[whole : self._used]
        self._writing = self._writer.submit(self._write, full[:whole], self._offset) if whole else None
        self._parts, self._used, self._offset = [other, full], rest, self._offset + whole

    def _grow(self, size: int) -> None:
        larger = _pages(size)
        larger[: self._used] = self._parts[0][: self._used]
        self._parts[0] = larger

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, part: UInt8[np.ndarray, "n"], offset: int) -> None:
        if self._straight is not None:
            try:
                _write(self._straight, part, offset)
                return
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                os.close(self._straight)
                self._straight = None
        _write(self._file, part, offset)


def _pages(size: int) -> UInt8[np.ndarray, "n"]:
    """Memory that begins at a page, of at least so many bytes."""
    return np.frombuffer(mmap.mmap(-1, -(-size // ALIGNED) * ALIGNED), np.uint8)


def _write(file: int, part: UInt8[np.ndarray, "n"], offset: int) -> None:
    left = part.data
    while left:
        done = os.pwrite(file, left, offset)
        left, offset = left[done:], offset + done
