"""Directories that are whole or not there: written beside their place, and renamed when they are complete; in a bucket, see `uploading`."""

import contextlib
import dataclasses
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from svlm_jax.bucket_path import BucketPath
from svlm_jax.checkpoints.uploading import UNFINISHED, Upload
from svlm_jax.errors import UserError
from svlm_jax.storage import Place


@dataclasses.dataclass(frozen=True)
class Staging:
    """A directory that is being written."""

    folder: Path
    settle: Callable[[Path], None] = lambda file: None  # says that this file of it will not change any more, so that it may go on its way


@contextlib.contextmanager
def staged(folder: Place, need: int = 0, *, sent: Callable[[int], None] | None = None) -> Iterator[Staging]:
    """A new directory beside `folder`, which takes its name when the block ends well, and is removed when it does not.

    For a folder in a bucket, it is one for temporary files (TMPDIR), whose files are sent. What a process that was killed left, here and
    there, is removed as well.

    Args:
      need: bytes that are going to be on the disk at once.
      sent: is told the bytes of each part that has been sent.

    Raises UserError where `folder` exists, the disk has no room for `need` bytes, or cannot be written to.
    """
    refuse_existing(folder)
    try:
        if isinstance(folder, BucketPath):
            with _draft(Path(tempfile.gettempdir(), f"svlm-jax-upload-{folder.name}"), folder, need) as draft, Upload(folder, draft, sent) as upload:
                yield Staging(draft, upload.send)
                upload.finish()
        else:
            with _draft(folder, folder, need) as draft:
                yield Staging(draft)
                os.rename(draft, folder)
    except OSError as error:
        mend = "check that you may write there" if isinstance(folder, BucketPath) else "check the disk's space and permissions"
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): {mend}") from error


@contextlib.contextmanager
def _draft(beside: Path, named: Place, need: int) -> Iterator[Path]:
    """A new directory beside `beside`, which is gone at the end."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    _sweep(beside)
    free = shutil.disk_usage(beside.parent).free
    if need > free:
        disk = "its disk: make room, or choose another disk" if beside == named else f"the disk of {beside.parent}: make room, or set TMPDIR"
        raise UserError(f"{named} needs {need / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free on {disk}")
    draft = beside.parent / f"{_prefix(beside)}{os.getpid()}.part"
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_existing(folder: Place) -> None:
    """UserError where `folder` is there; what an interruption left in a bucket does not count."""
    if folder.exists() and not (isinstance(folder, BucketPath) and (folder / UNFINISHED).is_file()):
        raise UserError(f"{folder} exists already: choose another directory, or remove it first")


def refuse_unfinished(folder: BucketPath) -> None:
    """UserError where the writing of `folder` was interrupted, or goes on."""
    if (folder / UNFINISHED).is_file():
        raise UserError(f"{folder} is not finished: wait for what writes it, or run that again")


def _prefix(folder: Path) -> str:
    return f".{folder.name}.{platform.node()}."


def _sweep(folder: Path) -> None:
    """Removes what processes of this machine that are gone left behind."""
    prefix = _prefix(folder)
    for left in folder.parent.iterdir():
        if not (left.name.startswith(prefix) and left.name.endswith(".part")):
            continue
        number = left.name[len(prefix) : -len(".part")]
        if number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # of an earlier life of this number, since this process has one at a time
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        pass
    return True
