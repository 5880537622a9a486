"""The commentary track of LiveSports-3K (arXiv 2504.16030): short events, each with what a human said about it and before it.

events   {"video_id", "event_id", "begin", "end", "video", "class", "event_title", "event_asr": [[start, end, text], ...],
          "event_asr_text", "preasr_text"}
results  {"video_id", "event_id", "begin", "end", "pred"}
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svlm_jax.errors import UserError
from svlm_jax.evaluation.inf_streams import ALL, Game, Piece, Result, Segment, parse_seconds
from svlm_jax.evaluation.journal import Row, read_rows

Key = tuple[str, str]  # video_id, event_id


@dataclasses.dataclass(frozen=True)
class Event:
    """One event of a video; times are seconds."""

    video_id: str
    event_id: str | int  # as the file has it
    begin: float
    end: float
    video: str  # a path, relative to the data set's folder
    title: str
    sport: str
    previous: str  # what the human said before
    said: tuple[Piece, ...]
    reference: str

    @property
    def key(self) -> Key:
        return self.video_id, str(self.event_id)

    @property
    def name(self) -> str:
        return f"{self.video_id}_{self.event_id}"

    def game(self) -> Game:
        return Game(self.name, self.title, self.sport, self.said or (Piece(self.begin, self.end, self.reference),))

    def segment(self) -> Segment:
        return Segment(self.name, self.title, self.sport, int(self.begin), int(self.end), self.reference, 0)


def read_events(path: Path) -> list[Event]:
    """The events of a file. Raises UserError for one of another form, and for two of one name."""
    events = [_event(path, number, row) for number, row in enumerate(read_rows(path), 1)]
    if not events:
        raise UserError(f"{path} holds no event: give LiveSports-3K-CC.json")
    seen: set[Key] = set()
    for event in events:
        if event.key in seen:
            raise UserError(f"{path}: event {event.event_id} of {event.video_id} is there twice: results could not be told apart; keep one")
        seen.add(event.key)
    return events


def _event(path: Path, number: int, row: Row) -> Event:
    try:
        begin, end = parse_seconds(row["begin"]), parse_seconds(row["end"])
        pieces = row.get("event_asr") or []
        pieces = json.loads(pieces) if isinstance(pieces, str) else pieces
        said = tuple(Piece(parse_seconds(start), parse_seconds(stop), " ".join(str(text).split())) for start, stop, text in pieces)
        reference = row.get("event_asr_text") or " ".join(piece.text for piece in said)
        if not begin < end or not reference:
            raise ValueError("the event has no length" if reference else "there is no transcript of it")
        video_id, event_id = str(row["video_id"]), row["event_id"]
        video, title = str(row.get("video") or f"{video_id}.mp4"), str(row.get("event_title") or "")
        return Event(
            video_id, event_id, begin, end, video, title, str(row.get("class") or ALL), str(row.get("preasr_text") or ""), said, reference
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {error}"
        raise UserError(f"{path}, row {number} is no event of LiveSports-3K-CC ({what}): give LiveSports-3K-CC.json") from None


def result_row(event: Event, said: Sequence[Piece]) -> Row:
    """A row of a result file."""
    text = " ".join(piece.text for piece in said if piece.text)
    return {"video_id": event.video_id, "event_id": event.event_id, "begin": event.begin, "end": event.end, "pred": text}


def merge(rows: Iterable[tuple[str, Row]]) -> dict[Key, str]:
    """What is said about each event; of two rows about one the later counts. Raises UserError for a row of another form."""
    found: dict[Key, str] = {}
    for where, row in rows:
        try:
            found[str(row["video_id"]), str(row["event_id"])] = " ".join(str(row["pred"] or "").split())
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{where}: not a row of video_id, event_id and pred ({type(error).__name__} {error}): give a result file"
            ) from None
    return found


def read_results(path: Path) -> dict[Key, str]:
    """A result file, or a folder of them."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .jsonl file: give a result file, or a folder of them")
    return merge((f"{file}, row {number}", row) for file in files for number, row in enumerate(read_rows(file), 1))


def as_results(events: Sequence[Event], said: Mapping[Key, str]) -> dict[str, Result]:
    """For the measures: each event a stream of its own, with all words spoken over all of it."""
    return {
        event.name: Result(event.begin, event.end, (Piece(event.begin, event.end, said[event.key]),))
        for event in events
        if event.key in said
    }


def predictions_bytes(events: Sequence[Event], said: Mapping[Key, str]) -> bytes:
    """A result file in the order of the events."""
    rows: list[dict[str, Any]] = [
        result_row(event, [Piece(event.begin, event.end, said[event.key])]) for event in events if event.key in said
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
