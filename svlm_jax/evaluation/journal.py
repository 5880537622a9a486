"""What survives a kill: files of JSON lines that only grow, files that are replaced whole, and a folder that one run has for itself."""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svlm_jax.errors import UserError
from svlm_jax.files import whole_file

Row = dict[str, Any]


class Journal:
    """JSON objects, a line each. A row is on the disk when `append` returns; a line that a kill has torn is cut off at the next opening.

    `append` may be called by several threads. Raises UserError where the file cannot be used, or was changed by another hand.
    """

    def __init__(self, path: Path):
        self.path, self.rows, self._lock = path, [], threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another folder") from None
        data = path.read_bytes()
        self.size = data.rfind(b"\n") + 1  # bytes of whole lines
        if self.size < len(data):
            os.ftruncate(self._fd, self.size)
        self.rows: list[Row] = [_row(path, number, line) for number, line in enumerate(data[: self.size].splitlines(), 1)]

    def append(self, *rows: Row) -> None:
        """All of the rows, or after a kill the first few of them."""
        data = b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n" for row in rows)
        if not data:
            return
        with self._lock:
            try:
                done = 0
                while done < len(data):
                    done += os.write(self._fd, data[done:])
                os.fsync(self._fd)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self.size)
                raise UserError(f"{self.path} cannot be written ({error.strerror}): make room and start again") from None
            self.size += len(data)
            self.rows += rows

    def cut(self, size: int) -> None:
        """Forgets what was appended after the file had `size` bytes. UserError where it never had, or no line ends there."""
        data = self.path.read_bytes()[:size]
        if len(data) < size or (data and not data.endswith(b"\n")):
            raise UserError(f"{self.path} is not as the run left it: put it back, or start in another folder")
        os.ftruncate(self._fd, size)
        self.size, self.rows = size, [_row(self.path, number, line) for number, line in enumerate(data.splitlines(), 1)]

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> list[Row]:
    """The whole lines of a journal that may be at work or may not be there. UserError as `read_rows`."""
    if not path.exists():
        return []
    return [_row(path, number, line) for number, line in enumerate(path.read_bytes().splitlines(True), 1) if line.endswith(b"\n")]


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = _parse(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number} is no JSON object: mend or remove that line")
    return row


def _parse(data: bytes) -> Any:
    """Of JSON, with half of a surrogate pair, which no file can hold, as a question mark. ValueError for what is none."""
    value = json.loads(data)
    if b"\\ud" in data.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def read_rows(path: Path) -> list[Row]:
    """The objects of a file of JSON lines, or of a JSON list. UserError names the file and the line that is wrong."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None
    if data.lstrip()[:1] == b"[":
        with contextlib.suppress(ValueError, RecursionError):
            rows = _parse(data)
            if all(isinstance(row, dict) for row in rows):
                return rows
        raise UserError(f"{path} begins as a JSON list and is none of objects: give a list of objects, or an object a line")
    return [_row(path, number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]


def write_whole(path: Path, data: bytes) -> None:
    """Replaces the file at once: whoever looks finds the old one or the new one, whole."""
    with whole_file(path) as draft:
        draft.write_bytes(data)


@contextlib.contextmanager
def run_folder(folder: Path, settings: Row) -> Iterator[None]:
    """Has a folder for one run alone, and refuses to go on there with other settings than it was begun with. Raises UserError.

    The lock goes with the process, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is at work in {folder}: wait for it, or choose another folder") from None
        _clear_drafts(folder)
        path = folder / "run.json"
        if path.exists():
            before = read_rows(path)[0] if path.stat().st_size else {}
            for name in sorted(before.keys() | settings.keys()):
                if before.get(name) != settings.get(name):
                    change = f"{before.get(name)!r}, not {settings.get(name)!r}"
                    raise UserError(f"{folder} was begun with {name} {change}: go on with the same settings, or choose another folder")
        else:
            write_whole(path, (json.dumps(settings, ensure_ascii=False, sort_keys=True) + "\n").encode())
        yield
    finally:
        os.close(lock)


def _clear_drafts(folder: Path) -> None:
    """Files that a killed run was writing."""
    for draft in folder.rglob("*.part"):
        with contextlib.suppress(OSError):
            draft.unlink()
