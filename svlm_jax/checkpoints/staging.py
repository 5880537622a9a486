"""Directories that are whole or not there: written beside their place, and renamed when they are complete."""

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from svlm_jax.errors import UserError


@contextlib.contextmanager
def staged(folder: Path, need: int = 0) -> Iterator[Path]:
    """A new directory beside `folder`, which takes its name when the block ends well, and is removed when it does not.

    What a process that was killed left there is removed as well.

    Args:
      need: bytes that are going to be written.

    Raises UserError where `folder` exists, the disk has no room for `need` bytes, or cannot be written to.
    """
    refuse_existing(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        free = shutil.disk_usage(folder.parent).free
        if need > free:
            raise UserError(f"{folder} needs {need / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free on its disk: make room, or choose another disk")
        staging = folder.parent / f"{_prefix(folder)}{os.getpid()}.part"
        staging.mkdir()
        try:
            yield staging
            os.rename(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): check the disk's space and permissions") from error


def refuse_existing(folder: Path) -> None:
    """UserError where `folder` is there."""
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another directory, or remove it first")


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
