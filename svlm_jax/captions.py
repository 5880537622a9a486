"""What was said, and the files that keep it: WebVTT, SubRip and JSON lines, readable after every round even if the program is killed."""

import contextlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from svlm_jax.errors import UserError

_LINE_BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")  # what str.splitlines or a terminal would break or jump at
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")  # C0, DEL, C1, the byte order mark and two non-characters
_SURROGATES = re.compile("[\ud800-\udfff]")  # not encodable as UTF-8
_SPACES = re.compile(" {2,}")
_ARROW = re.compile("-[- ]+>")  # SubRip readers take "-->", "- >" and "-- >" alike for a timing line
_VTT_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})  # ">" too: "-->" is forbidden inside a cue


def clean(text: str) -> str:
    """The same words as one line of plain text that every format, UTF-8 and a terminal can carry; may be empty."""
    text = _CONTROLS.sub("", _LINE_BREAKS.sub(" ", text))
    return _SPACES.sub(" ", _SURROGATES.sub("\ufffd", text)).strip()


def clock(seconds: float) -> str:
    """A position in the video as 00:00:12 (hours grow beyond two digits; fractions are dropped)."""
    whole = max(0, int(seconds))
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


@dataclass(frozen=True)
class Caption:
    """What was said about one round of video. Raises ValueError for times that are negative or not finite."""

    start: float  # seconds from the start of the video
    end: float  # seconds
    text: str  # as the model wrote it, without the closing " ..."

    def __post_init__(self) -> None:
        if not (0 <= self.start < math.inf and 0 <= self.end < math.inf):
            raise ValueError(f"a caption from {self.start} s to {self.end} s")

    @property
    def silent(self) -> bool:
        """Nothing that can be read was said."""
        return not clean(self.text)


def _timing(caption: Caption, comma: str) -> str:
    start = round(caption.start * 1000)
    end = max(round(caption.end * 1000), start + 1)  # strict readers refuse a cue that ends where it starts
    return " --> ".join(f"{clock(ms // 1000)}{comma}{ms % 1000:03}" for ms in (start, end))


def _vtt_cue(caption: Caption, number: int) -> str:
    """https://www.w3.org/TR/webvtt1/#webvtt-cue-block"""
    if caption.silent:
        return ""
    return f"{_timing(caption, '.')}\n{clean(caption.text).translate(_VTT_ESCAPES)}\n\n"


def _srt_cue(caption: Caption, number: int) -> str:
    """SubRip has no standard and no escapes: an arrow, which would read as a timing line, becomes one character."""
    if caption.silent:
        return ""
    return f"{number}\n{_timing(caption, ',')}\n{_ARROW.sub('→', clean(caption.text))}\n\n"


def record(caption: Caption) -> dict[str, str | float]:
    """What a JSON line says about a round."""
    kind = "silence" if caption.silent else "segment"
    return {"type": kind, "start": round(caption.start, 3), "end": round(caption.end, 3), "text": clean(caption.text)}


def _json_line(caption: Caption, number: int) -> str:
    return json.dumps(record(caption), ensure_ascii=False, allow_nan=False) + "\n"


class _Format(NamedTuple):
    header: bytes
    cue: Callable[[Caption, int], str]  # the caption and its number from 1 -> its text in the file, empty for none


_FORMATS = {".vtt": _Format(b"WEBVTT\n\n", _vtt_cue), ".srt": _Format(b"", _srt_cue), ".jsonl": _Format(b"", _json_line)}


def document(captions: Iterable[Caption], suffix: str) -> str:
    """All that a file of that suffix (.vtt, .srt, .jsonl) would hold."""
    form, cues = _FORMATS[suffix], 0
    parts = [form.header.decode()]
    for caption in captions:
        cue = form.cue(caption, cues + 1)
        cues += bool(cue)
        parts.append(cue)
    return "".join(parts)


class CaptionFile:
    """One file. `open`, `begin`, then `write` once a round, then `close`.

    Nothing is buffered: a cue is one write call, on its way to the disk when `write` returns, so neither Ctrl-C nor kill -9 loses or halves
    what was said before. A write that fails (disk full) is undone, so that the file ends with its last whole cue.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Looks at the path and changes nothing. Raises UserError if it can't be written, or its suffix names no format."""
        self.path = Path(path)
        form = _FORMATS.get(self.path.suffix.lower())
        if form is None:
            raise UserError(f"{self.path}: captions are written to files named .vtt, .srt or .jsonl")
        self._format = form
        self._target = os.path.realpath(self.path)  # a link's own name must survive
        self._fd = -1
        self._regular = True  # False: a pipe or a device, where nothing can be undone
        self._size = 0  # bytes up to the end of the last whole cue
        self._cues = 0
        self._said_until = 0.0  # seconds
        self._check()

    def _check(self) -> None:
        parent = os.path.dirname(self._target)
        effective = os.access in os.supports_effective_ids
        try:
            exists = self._exists()
            if os.path.isdir(self._target):
                raise UserError(f"{self.path}: this is a directory; name a file in it")
            if not os.path.isdir(parent):
                raise UserError(f"{self.path}: there is no directory {parent}; create it first")
        except OSError as error:  # such as a name that is too long
            raise self._failure(error) from error
        if exists and not os.access(self._target, os.W_OK, effective_ids=effective):
            raise UserError(f"{self.path}: no permission to write to this file; choose another")
        if not exists and not os.access(parent, os.W_OK | os.X_OK, effective_ids=effective):
            raise UserError(f"{self.path}: no permission to create files in {parent}; choose another directory")

    def _exists(self) -> bool:
        try:
            os.stat(self._target)
        except FileNotFoundError:
            return False
        return True

    def same_as(self, other: "CaptionFile") -> bool:
        """Whether both names lead to one file."""
        if self._target == other._target:
            return True
        return self._exists() and other._exists() and os.path.samefile(self._target, other._target)

    def open(self) -> None:
        """Opens the file, or creates it with its header already in it; an existing file is unchanged. Raises UserError."""
        try:
            self._fd = os.open(self._target, os.O_WRONLY) if self._exists() else self._create()
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        except OSError as error:
            raise self._failure(error) from error

    def _create(self) -> int:
        # Filled under another name and then renamed, because an empty .vtt is not a valid one, not even for a moment.
        draft = os.path.join(os.path.dirname(self._target), f".svlm-{secrets.token_hex(8)}.part")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(fd, self._format.header)
            os.rename(draft, self._target)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        return fd

    def begin(self) -> None:
        """Replaces what an existing file held by the header. Raises UserError."""
        header = self._format.header
        try:
            if header:
                os.write(self._fd, header)  # over the old one, before the rest goes: the file is never empty
            if self._regular:
                os.ftruncate(self._fd, len(header))
                os.lseek(self._fd, len(header), os.SEEK_SET)
        except OSError as error:
            raise self._failure(error) from error
        self._size = len(header)

    def write(self, caption: Caption) -> None:
        """Adds the round, if the format keeps it. Raises UserError, the file ending with its last whole cue, when the write fails."""
        data = self._format.cue(caption, self._cues + 1).encode("utf-8")
        if not data:
            return
        done = 0
        try:
            while done < len(data):  # a write to a disk that fills up comes back short before one fails
                done += os.write(self._fd, data[done:])
        except OSError as error:
            self._undo()
            kept = f"it keeps what was said up to {clock(self._said_until)}" if self._cues else "nothing is kept in it"
            raise UserError(f"{self._failure(error)}; {kept}") from error
        except BaseException:  # Ctrl-C: the cue stays if it's whole, even if the count was lost
            if self._regular and os.fstat(self._fd).st_size != self._size + len(data):
                self._undo()
            raise
        self._size += len(data)
        self._cues += 1
        self._said_until = caption.end

    def _undo(self) -> None:
        if not self._regular:
            return
        with contextlib.suppress(OSError):  # the failed write is what the user hears about
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)

    def _failure(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: {error.strerror or error}")

    def close(self) -> None:
        """Raises UserError if a network disk reports only now that it's full. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                raise self._failure(error) from error


class CaptionFiles:
    """All caption files of a run, as a context manager. Until `start` (or the first `write`) every existing file is as it was."""

    def __init__(self, files: list[CaptionFile]):
        self._files = files
        self._started = False
        self._closed = False

    def start(self) -> None:
        """Opens the files and empties those of an earlier run: call it when nothing slow can fail any more. Raises UserError."""
        if self._closed:
            raise ValueError("these caption files are closed")
        if self._started:
            return
        for file in self._files:  # all before any is emptied
            file.open()
        for file in self._files:
            file.begin()
        self._started = True

    def write(self, caption: Caption) -> None:
        """Adds one round to every file. Raises UserError for the first that fails, after the others have got the round."""
        self.start()
        failure: UserError | None = None
        for file in self._files:
            try:
                file.write(caption)
            except UserError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Closes the files; one that was never started is not touched. Raises UserError."""
        self._closed = True
        failure: UserError | None = None
        for file in self._files:
            try:
                file.close()
            except UserError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def __enter__(self) -> "CaptionFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # else what went wrong first matters more
                raise


def open_caption_files(paths: Iterable[str | os.PathLike[str]]) -> CaptionFiles:
    """Checks every path (suffix, directory, permission, named twice) before any long work, and changes none. Raises UserError."""
    files: list[CaptionFile] = []
    for path in paths:
        file = CaptionFile(path)
        for other in files:
            if file.same_as(other):
                raise UserError(f"{file.path}: this is the same file as {other.path}; name each caption file once")
        files.append(file)
    return CaptionFiles(files)
