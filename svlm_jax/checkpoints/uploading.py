"""A directory's way into a bucket, where nothing can be renamed: marked as unfinished, and sent such that what makes it a checkpoint comes last.

    DST/UNFINISHED      the first object that is written, and deleted behind the last; who finds it takes what is there for nothing
    DST/...             the files, those in the deepest folders first
    DST/config.json     without which no tool takes a directory for a model
"""

import contextlib
import itertools
import os
import platform
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from svlm_jax.bucket_path import BucketPath
from svlm_jax.errors import UserError

UNFINISHED = "UNFINISHED"
LAST = ("config.json", "adapter_config.json")
SENDERS = 8  # files at once


class Upload:
    """The files of `source` on their way to `target`; a context manager, which takes back what it has sent unless `finish` was reached."""

    def __init__(self, target: BucketPath, source: Path, sent: Callable[[int], None] | None = None):
        """`sent` is told the bytes of each part."""
        self._target, self._source, self._sent = target, source, sent
        self._own = f"{platform.node()} {os.getpid()} {secrets.token_hex(8)}"
        self._early: Future[None] | None = None
        self._finished = False

    def __enter__(self) -> "Upload":
        self._pool = ThreadPoolExecutor(SENDERS)
        self._target.remove()  # what an interruption left
        (self._target / UNFINISHED).write_bytes(self._own.encode())
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if not self._finished:
            with contextlib.suppress(OSError):  # what went wrong before is told
                if self._is_own():
                    self._target.remove()

    def send(self, file: Path) -> None:
        """Begins to send a file that is whole, and to free its room; waits for the one before."""
        if self._early is not None:
            self._early.result()
        self._early = self._pool.submit(self._send, file)

    def finish(self) -> None:
        """Sends the rest. UserError where another process has begun to write there as well, which then has the place."""
        if self._early is not None:
            self._early.result()
        files = sorted((file for file in self._source.rglob("*") if file.is_file()), key=self._turn)
        for turn, group in itertools.groupby(files, self._turn):
            if turn[0] and not self._is_own():
                raise UserError(f"{self._target} is being written by another process as well: let one of them end, then run this again")
            list(self._pool.map(self._send, group))
        self._finished = True
        (self._target / UNFINISHED).remove()

    def _turn(self, file: Path) -> tuple[bool, int]:
        parts = file.relative_to(self._source).parts
        return parts[0] in LAST, -len(parts)

    def _send(self, file: Path) -> None:
        (self._target / file.relative_to(self._source).as_posix()).upload(file, self._sent)
        file.unlink()

    def _is_own(self) -> bool:
        mark = self._target / UNFINISHED
        return mark.is_file() and mark.read_text() == self._own
