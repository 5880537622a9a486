"""A path in a bucket (gs://BUCKET/...), with as much of `pathlib.Path` as checkpoints ask for."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from svlm_jax.errors import UserError

SCHEME = "gs://"


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def library() -> Any:
    """The file system of buckets; connections are kept for as long as the process lives, and no listing is: others write there too."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("paths that begin with gs:// need the package gcsfs: pip install 'svlm-jax[gcs]', or mount the bucket")
    import fsspec

    return fsspec.filesystem("gs", use_listings_cache=False)


@contextlib.contextmanager
def _told(path: "BucketPath") -> Iterator[None]:
    """What the library raises, of many kinds, as OSError with its first line."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(None, next(iter(str(error).splitlines()), "") or type(error).__name__, path.url) from error


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """One object, or what all objects have in common whose names begin so: a bucket knows no folders. Raises OSError as files do."""

    url: str

    def __post_init__(self):
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __truediv__(self, name: str | os.PathLike) -> "BucketPath":
        return BucketPath(f"{self.url}/{os.fspath(name)}")

    @property
    def _inner(self) -> PurePosixPath:
        return PurePosixPath(self.url.removeprefix(SCHEME))

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def suffix(self) -> str:
        return self._inner.suffix

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(f"{SCHEME}{self._inner.parent}")

    def relative_to(self, other: "BucketPath") -> PurePosixPath:
        return self._inner.relative_to(other._inner)

    def expanduser(self) -> "BucketPath":
        return self

    def resolve(self) -> "BucketPath":
        return self

    def exists(self) -> bool:
        """Whether there is such an object, or one whose name goes on with a slash."""
        with _told(self):
            return library().exists(self.url)

    def is_file(self) -> bool:
        with _told(self):
            return library().isfile(self.url)

    def is_dir(self) -> bool:
        with _told(self):
            return library().isdir(self.url)

    def iterdir(self) -> Iterator["BucketPath"]:
        with _told(self):
            found = library().ls(self.url, detail=False)
        yield from sorted({BucketPath(SCHEME + name) for name in found} - {self})

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """Every object whose name begins so, at whatever depth; `pattern` is "*"."""
        assert pattern == "*", pattern
        with _told(self):
            found = library().find(self.url)
        yield from (BucketPath(SCHEME + name) for name in found if not name.endswith("/"))

    def size(self) -> int:
        """Bytes of the object."""
        with _told(self):
            return int(library().info(self.url)["size"])

    def read_bytes(self, start: int = 0, end: int | None = None) -> bytes:
        """The object, or the bytes from `start` to `end` of it; fewer where it ends before."""
        with _told(self):
            part = (None, None) if start == 0 and end is None else (start, end)
            return library().cat_file(self.url, *part)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        with _told(self):
            library().pipe_file(self.url, content)

    def upload(self, file: str | os.PathLike, sent: Callable[[int], None] | None = None) -> None:
        """Makes the object a copy of a file; `sent` is told the bytes of each part."""
        with _told(self):
            from fsspec.callbacks import Callback

            class Sent(Callback):
                def relative_update(self, inc: int = 1) -> None:
                    if sent is not None:
                        sent(inc)

            library().put_file(os.fspath(file), self.url, callback=Sent())

    def remove(self) -> None:
        """Deletes the object, and all whose names go on with a slash; nothing where there is none."""
        with _told(self), contextlib.suppress(FileNotFoundError):
            library().rm(self.url, recursive=True)
