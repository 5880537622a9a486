"""Annotation rows in an ArrayRecord file: random access that stays fast on network storage, where many hosts read."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from svlm_jax import storage
from svlm_jax.data.annotations import AnnotationFile, UnusableRow
from svlm_jax.errors import UserError

NEEDED = "ArrayRecord files need grain and array_record: pip install 'svlm-jax[train]'"


class RecordFile(Sequence[bytes]):
    """The rows of one file, unchanged; of one in a bucket when it has been fetched. Raises UserError where it cannot be opened."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(storage.local_copy(path))
        try:
            from grain.sources import ArrayRecordDataSource
        except ImportError:
            raise UserError(NEEDED) from None
        try:
            self._source: Any = ArrayRecordDataSource([self.path])
            self._size = len(self._source)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{self.path} cannot be read ({error}): make it with svlm data convert") from None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row):
        return self._source[row]


def open_records(path: str | os.PathLike) -> RecordFile:
    """An ArrayRecord file that `convert` wrote."""
    return RecordFile(path)


def convert(files: Iterable[AnnotationFile], out: str | os.PathLike) -> tuple[int, Counter[str]]:
    """Writes the rows that can be parsed, each once, byte for byte; gives their number, and how many were left out by reason.

    The file appears under its name when it is whole. Raises UserError where it cannot be written.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError:
        raise UserError(NEEDED) from None
    target = Path(out)
    if target.suffix != ".array_record":
        raise UserError(f"{target}: name the file .array_record, so that it is known for one")
    partial = target.with_name(target.name + ".part")
    written, left_out = 0, Counter()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")  # a group is read whole, and rows are read one by one
    except (RuntimeError, OSError) as error:
        raise UserError(f"{target} cannot be written ({error}): choose another folder") from None
    try:
        for file in files:
            for row in range(len(file)):
                try:
                    file.annotation(row)
                except UnusableRow as error:
                    left_out[error.reason] += 1
                    continue
                writer.write(file[row])
                written += 1
        writer.close()
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return written, left_out
