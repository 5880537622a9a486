"""Buckets (gs://BUCKET/...) beside the files of this machine: data are read from them, and a run is kept in one."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from svlm_jax.bucket_path import BucketPath, is_remote, library
from svlm_jax.errors import UserError
from svlm_jax.files import whole_file

Place = Path | BucketPath
PULLED = ("metrics.jsonl", "wandb_id")  # what a run that goes on needs of its former life, besides checkpoints
BLOCK = 1 << 22  # bytes of a video that are asked for at a time


def at(path: str | os.PathLike) -> Place:
    """A path as what it is: of this machine, or of a bucket."""
    return BucketPath(os.fspath(path)) if is_remote(path) else Path(path)


def size_of(file: Place) -> int:
    """Bytes of a file or object. OSError where there is none."""
    return file.size() if isinstance(file, BucketPath) else file.stat().st_size


def read_range(file: Place, start: int, end: int) -> bytes:
    """The bytes from `start` to `end` of a file or object; fewer where it ends before. OSError where there is none."""
    if isinstance(file, BucketPath):
        return file.read_bytes(start, end)
    with open(file, "rb") as source:
        source.seek(start)
        return source.read(end - start)


def join(folder: str, name: str) -> str:
    """`name` in `folder`, which may be in a bucket; a name that is whole by itself stays as it is."""
    if is_remote(name) or not is_remote(folder):
        return name if is_remote(name) else str(Path(folder, name))
    return f"{folder.rstrip('/')}/{name}"


def directory(path: str | os.PathLike) -> Any:
    """A folder as Orbax takes it: whole, and of a type that knows where it is."""
    if not is_remote(path):
        return Path(path).resolve()
    library()  # or a word on what to install
    from etils import epath

    return epath.Path(os.fspath(path))


def opened(path: str) -> IO[bytes]:
    """An object as a file to read and seek in. FileNotFoundError where there is none."""
    return library().open(path, "rb", block_size=BLOCK)


def local_copy(path: str | os.PathLike) -> Path:
    """`path` itself, or of an object a copy on this machine, fetched once for every content that it has. UserError where there is none."""
    if not is_remote(path):
        return Path(path)
    source, bucket = os.fspath(path), library()
    try:
        told = bucket.info(source)
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such object: check the path") from None
    content = ":".join(str(told.get(key)) for key in ("name", "size", "generation", "etag", "mtime"))
    place = Path(tempfile.gettempdir(), "svlm-jax-fetched", hashlib.blake2b(content.encode(), digest_size=8).hexdigest())
    copy = place / source.rpartition("/")[2]
    if not copy.is_file():
        with whole_file(copy) as draft:
            bucket.get_file(source, str(draft))
    return copy


class Mirror:
    """A folder of this machine that a bucket gets copies of: what is appended to or renamed, which objects cannot be."""

    def __init__(self, remote: str, *, go_on: bool = True):
        """With `go_on`, begins with what `remote` has of a run's former life."""
        self.remote, self.local = remote, Path(tempfile.mkdtemp(prefix="svlm-jax-run-"))
        self._library = library()
        self._pushed: dict[str, tuple[int, int]] = {}  # by name in the folder: size, and when it changed
        for name in PULLED if go_on else ():
            if self._library.exists(join(remote, name)):
                self._library.get_file(join(remote, name), str(self.local / name))

    def push(self) -> None:
        """Copies what has changed since the last time."""
        for file in sorted(self.local.rglob("*")):
            if not file.is_file():
                continue
            status, name = file.stat(), file.relative_to(self.local).as_posix()
            now = status.st_size, status.st_mtime_ns
            if self._pushed.get(name) != now:
                self._library.pipe_file(join(self.remote, name), file.read_bytes())
                self._pushed[name] = now

    def close(self) -> None:
        """Copies what is left to copy, and removes the folder."""
        try:
            self.push()
        finally:
            shutil.rmtree(self.local, ignore_errors=True)
