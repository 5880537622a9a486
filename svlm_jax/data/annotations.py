"""Annotated clips as published: a JSON list of two messages a line, found by a byte index of our own.

    [{"role": "user", "content": [{"type": "video", "video": PATH, "video_start": 16.8, "video_end": 158.8},
                                  {"type": "text", "text": QUERY, "previous": TEXT, ...}]},
     {"role": "assistant", "content": [{"type": "text_stream", "text_stream": [[16.8, 16.9, "all"], ...],
                                        "qa_stream": [[start, ask_time, question, answer], ...]}]}]

LiveCC appends a list of offsets as its last line, StreamingVLM keeps one in `<stem>_seeks.jsonl`. Both count characters and not
bytes, so neither is used: a last line of numbers is left out, and the side file is not opened.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from svlm_jax import storage
from svlm_jax.errors import UserError
from svlm_jax.types import Int

INDEX_SUFFIX = ".svlm-index.npz"
INDEX_VERSION = 1  # of the side file's contents
LONGEST = 1e9  # seconds; beyond it a number is no time
MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put first


class UnusableRow(UserError):
    """A row that cannot be trained on. `reason` names the kind, so that such rows can be counted; the message tells the details."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses from worker processes
        return _revive, (self.reason, str(self))


def _revive(reason: str, message: str) -> UnusableRow:
    row = UnusableRow(reason)
    row.args = (message,)
    return row


class Word(NamedTuple):
    """A word and when it is spoken, in seconds of the video."""

    start: float
    end: float
    text: str


class Question(NamedTuple):
    """A question put in mid-stream; `start` is whatever the file has before the time, and is not used."""

    start: Any
    asked: float  # seconds of the video
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One clip of a video and what is said in it."""

    video: str  # path, relative to the data set's root as a rule
    start: float  # seconds of the video
    end: float
    query: str
    previous: str  # all that was said before the clip
    words: tuple[Word, ...]
    questions: tuple[Question, ...] = ()
    other: tuple[tuple[str, Any], ...] = ()  # what else is said about the clip (title, category), as (key, value)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LONGEST:
        raise UnusableRow("not a streaming row", f"{what} is {value!r} and must be a number")
    return float(value)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow("not a streaming row", f"{what} is {value!r} and must be a text")
    return value


def parse_annotation(line: bytes | str) -> Annotation:
    """One line of a file. Raises UnusableRow where it is no JSON, no streaming row, or holds an impossible time."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableRow("broken JSON", str(error)) from None
    return annotation_from(row)


def annotation_from(row: Any) -> Annotation:
    """The annotation of two messages. Raises UnusableRow as `parse_annotation` does."""
    try:
        user, assistant = row
        clip, asked = user["content"]
        said = assistant["content"][0]
        video, words = clip["video"], said["text_stream"]
        begin, stop = clip["video_start"], clip["video_end"]
        words = tuple(Word(*word) for word in words)
        questions = tuple(Question(*question[:4]) for question in said.get("qa_stream") or ())
        other = tuple((key, value) for key, value in asked.items() if key not in ("type", "text", "previous"))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UnusableRow("not a streaming row", f"{type(error).__name__} {error}") from None
    start, end = _number(begin, "video_start"), _number(stop, "video_end")
    if not 0 <= start < end:
        raise UnusableRow("impossible times", f"the clip lasts from {start:g} to {end:g} s")
    return Annotation(
        video=_text(video, "video"),
        start=start,
        end=end,
        query=_text(asked.get("text", ""), "the query"),
        previous=_text(asked.get("previous", ""), "previous"),
        words=tuple(Word(_number(w.start, "a word's start"), _number(w.end, "a word's end"), _text(w.text, "a word")) for w in words),
        questions=tuple(
            Question(q.start, _number(q.asked, "a question's time"), _text(q.question, "a question"), _text(q.answer, "an answer"))
            for q in questions
        ),
        other=other,
    )


def annotation_row(annotation: Annotation) -> list[dict[str, Any]]:
    """The two messages of an annotation, as files have them."""
    a = annotation
    clip = {"type": "video", "video": a.video, "video_start": a.start, "video_end": a.end}
    asked = {"type": "text", "text": a.query, "previous": a.previous, **dict(a.other)}
    said: dict[str, Any] = {"type": "text_stream", "text_stream": [list(word) for word in a.words]}
    if a.questions:
        said["qa_stream"] = [list(question) for question in a.questions]
    return [{"role": "user", "content": [clip, asked]}, {"role": "assistant", "content": [said]}]


@dataclasses.dataclass(frozen=True)
class ByteIndex:
    """Where the rows of a file stand."""

    starts: Int[np.ndarray, "rows"]  # byte of the first character, int64
    sizes: Int[np.ndarray, "rows"]  # bytes, without the line break
    twins: Int[np.ndarray, "rows"]  # the first row of the same bytes; its own number where there is none before it
    content: str  # a digest of all rows in their order


def _is_offsets(line: bytes) -> bool:
    """Whether a line is a list of numbers (LiveCC's index) and no row."""
    line = line.strip()
    return line.startswith(b"[") and line[1:].lstrip()[:1] in (*(b"%d" % digit for digit in range(10)), b"]")


def build_index(path: str | os.PathLike) -> ByteIndex:
    """Reads the file once. Blank lines are none, and neither is a last line that lists offsets."""
    starts, sizes, twins, digests, seen, at = [], [], [], [], {}, 0
    last = b""
    with open(path, "rb") as file:
        for line in file:
            body = line.removeprefix(MARK) if at == 0 else line
            if body.strip():
                digest = hashlib.blake2b(body.strip(), digest_size=16).digest()
                digests.append(digest)
                twins.append(seen.setdefault(digest, len(starts)))
                starts.append(at + len(line) - len(body))
                sizes.append(len(body.rstrip(b"\r\n")))
                last = body
            at += len(line)
    if starts and _is_offsets(last):
        del starts[-1], sizes[-1], twins[-1], digests[-1]
    content = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
    return ByteIndex(np.asarray(starts, np.int64), np.asarray(sizes, np.int64), np.asarray(twins, np.int64), content)


def load_index(path: str | os.PathLike, *, keep: bool = True) -> ByteIndex:
    """The index of a file, from its side file where that is of this very file, else built, and written beside it if `keep`.

    A folder that cannot be written to is no error: the index is built anew each time.
    """
    source = Path(path)
    side = source.with_name(source.name + INDEX_SUFFIX)
    status = source.stat()
    stamp = np.asarray([INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError), np.load(side) as stored:
        if np.array_equal(stored["stamp"], stamp):
            return ByteIndex(stored["starts"], stored["sizes"], stored["twins"], str(stored["content"]))
    index = build_index(source)
    if keep:
        with contextlib.suppress(OSError):
            handle, temporary = tempfile.mkstemp(dir=source.parent, prefix=side.name, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez(file, stamp=stamp, **dataclasses.asdict(index))
                os.replace(temporary, side)  # whole or not at all
            except OSError:
                os.unlink(temporary)
                raise
    return index


class AnnotationFile:
    """Random access to the rows of one file: `len`, and `[i]` gives the bytes of row i.

    A file in a bucket is fetched first. Raises UserError on construction where there is no such file, or where it holds no row.
    """

    def __init__(self, path: str | os.PathLike, *, keep_index: bool = True):
        self.path = storage.local_copy(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: there is no such annotation file: check the path")
        self.index = load_index(self.path, keep=keep_index)
        if not len(self):
            hint = "it is an index that goes with another file" if self.path.stem.endswith("_seeks") else "it holds no row"
            raise UserError(f"{self.path}: {hint}: give a file with a JSON list of two messages a line")

    def __len__(self) -> int:
        return len(self.index.starts)

    def __getitem__(self, row: int) -> bytes:
        with open(self.path, "rb") as file:  # opened anew: readers are shared by threads, and sent to processes
            file.seek(int(self.index.starts[row]))
            return file.read(int(self.index.sizes[row]))

    def __iter__(self) -> Iterator[bytes]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"AnnotationFile({str(self.path)!r}, {len(self)} rows)"

    def annotation(self, row: int) -> Annotation:
        """Row `row`. Raises UnusableRow as `parse_annotation` does, and where an earlier row of the file is the same."""
        if self.index.twins[row] != row:
            raise UnusableRow("doubled", f"the same as row {int(self.index.twins[row])}")
        return parse_annotation(self[row])
