"""Buckets (gs://BUCKET/...) beside the files of this machine: data are read from them, and a run is kept in one."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from svlm_jax.errors import UserError
from svlm_jax.files import whole_file

SCHEME = "gs://"
PULLED = ("metrics.jsonl", "wandb_id")  # what a run that goes on needs of its former life, besides checkpoints
BLOCK = 1 << 22  # bytes of a video that are asked for at a time


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def join(folder: str, name: str) -> str:
    """`name` in `folder`, which may be in a bucket; a name that is whole by itself stays as it is."""
    if is_remote(name) or not is_remote(folder):
        return name if is_remote(name) else str(Path(folder, name))
    return f"{folder.rstrip('/')}/{name}"


def directory(path: str) -> Any:
    """A folder as Orbax takes it: whole, and of a type that knows where it is."""
    if not is_remote(path):
        return Path(path).resolve()
    _bucket_library()
    from etils import epath

    return epath.Path(path)


def opened(path: str) -> IO[bytes]:
    """An object as a file to read and seek in. FileNotFoundError where there is none."""
    return _bucket_library().open(path, "rb", block_size=BLOCK)


def local_copy(path: str | os.PathLike) -> Path:
    """`path` itself, or of an object a copy on this machine, fetched once for every content that it has. UserError where there is none."""
    if not is_remote(path):
        return Path(path)
    source, library = os.fspath(path), _bucket_library()
    try:
        told = library.info(source)
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such object: check the path") from None
    content = ":".join(str(told.get(key)) for key in ("name", "size", "generation", "etag", "mtime"))
    place = Path(tempfile.gettempdir(), "svlm-jax-fetched", hashlib.blake2b(content.encode(), digest_size=8).hexdigest())
    copy = place / source.rpartition("/")[2]
    if not copy.is_file():
        with whole_file(copy) as draft:
            library.get_file(source, str(draft))
    return copy


class Mirror:
    """A folder of this machine that a bucket gets copies of: what is appended to or renamed, which objects cannot be."""

    def __init__(self, remote: str, *, go_on: bool = True):
        """With `go_on`, begins with what `remote` has of a run's former life."""
        self.remote, self.local = remote, Path(tempfile.mkdtemp(prefix="svlm-jax-run-"))
        self._library = _bucket_library()
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


def _bucket_library() -> Any:
    """The file system of buckets; connections are kept for as long as the process lives."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("paths that begin with gs:// need the package gcsfs: pip install 'svlm-jax[gcs]', or mount the bucket")
    import fsspec

    return fsspec.filesystem("gs")
