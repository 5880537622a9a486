"""Inf-Streams-Eval (arXiv 2510.09608, section 4): long games, the 100-second segments that are judged, and result files.

    metadata  {"video": PATH, "title": TEXT, "content": [[start, end, text], ...]}
    results   {"video": NAME, "chunk_start": s, "chunk_end": s, "items": [{"response", "start_time", "end_time"}, ...]}

Times are seconds of the video. Results know a video by the last part of its path.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from svlm_jax.errors import UserError
from svlm_jax.evaluation.journal import Row, read_rows

_CLOSING = re.compile(r"(?:^| )\.\.\.$")  # how a turn ends, which is no speech
ALL = "all"  # the sport of videos that lie in no folder


class Piece(NamedTuple):
    """Something said, by a broadcaster or by a contestant; an empty text is silence."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class Game:
    """A video and what was said in it."""

    video: str  # its path, relative to the data set's folder
    title: str
    sport: str
    said: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return PurePosixPath(self.video).name

    @property
    def end(self) -> int:
        """Where the reference ends, in whole seconds, as published."""
        return int(self.said[-1].end)

    def before(self, time: float) -> str:
        """All that was said by then."""
        return " ".join(piece.text for piece in self.said if piece.end <= time)


@dataclasses.dataclass(frozen=True)
class Segment:
    """What is judged at once."""

    video: str  # Game.name
    title: str
    sport: str
    start: int
    end: int
    reference: str
    fifth: int  # 0 to 4: which fifth of the video it lies in

    @property
    def name(self) -> str:
        return f"{self.video} {self.start}-{self.end}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a contestant said about one video, from `start` to `end`, but for what is `missing`."""

    start: float
    end: float
    items: tuple[Piece, ...]
    missing: tuple[tuple[float, float], ...] = ()  # stretches that no shard is of, in order

    def spans(self) -> list[tuple[float, float]]:
        """Stretches that it is of."""
        edges = [self.start, *(time for gap in self.missing for time in gap), self.end]
        return list(zip(edges[::2], edges[1::2], strict=True))


def read_games(path: Path) -> list[Game]:
    """The rows of a metadata file. Raises UserError for what is not of the published form."""
    games = [_game(path, number, row) for number, row in enumerate(read_rows(path), 1)]
    if not games:
        raise UserError(f"{path} holds no row: give the benchmark's metadata file")
    return games


def _game(path: Path, number: int, row: Row) -> Game:
    try:
        video, title = row["video"], row.get("title", "")
        said = tuple(Piece(parse_seconds(start), parse_seconds(end), " ".join(str(text).split())) for start, end, text in row["content"])
        sport = row.get("sport") or row.get("category") or PurePosixPath(video).parent.name or ALL
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {error}"
        raise UserError(
            f"{path}, row {number}: no video, title and content of [start, end, text] ({what}): give the benchmark's metadata"
        ) from None
    if not video or not said:
        raise UserError(f"{path}, row {number}: {'no words' if video else 'no video'}: remove the row")
    return Game(str(video), str(title), str(sport), said)


def parse_seconds(value: Any) -> float:
    """A time of a file. ValueError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"{value!r} is no time in seconds")
    return float(value)


def whole_games(games: Sequence[Game]) -> list[Game]:
    """Checks that each row is a video of its own."""
    seen: dict[str, str] = {}
    for game in games:
        if game.name in seen:
            raise UserError(f"two rows are of {game.name} ({seen[game.name]} and {game.video}): results could not be told apart; keep one")
        seen[game.name] = game.video
    return list(games)


def cut_segments(games: Iterable[Game], start: float, seconds: float, min_words: int) -> list[Segment]:
    """Windows of `seconds` from `start` on, whole ones, in which the reference has at least `min_words` words.

    A piece belongs to the window that its start lies in.
    """
    segments = []
    for game in games:
        count = max(0, math.floor((game.end - start) / seconds + 1e-9))
        said: list[list[str]] = [[] for _ in range(count)]
        for piece in game.said:
            window = math.floor((piece.start - start) / seconds + 1e-9)
            if 0 <= window < count:
                said[window].append(piece.text)
        for window, texts in enumerate(said):
            if sum(len(text.split()) for text in texts) >= min_words:
                begin = round(start + window * seconds)
                segments.append(_segment(game, begin, round(start + (window + 1) * seconds), "\n".join(texts)))
    return segments


def _segment(game: Game, start: int, end: int, reference: str) -> Segment:
    fifth = min(4, int(5 * (start + end) / 2 / max(1, game.end)))
    return Segment(game.name, game.title, game.sport, start, end, reference, fifth)


def read_segments(path: Path, games: Sequence[Game]) -> list[Segment]:
    """Segments as published: rows of the metadata's form that hold one segment's words each."""
    known = {game.name: game for game in games}
    segments = []
    for row in read_games(path):
        if row.name not in known:
            raise UserError(f"{path}: {row.video} is not in the metadata: give segments and metadata of the same data set")
        reference = "\n".join(piece.text for piece in row.said)
        segments.append(_segment(known[row.name], int(row.said[0].start), row.end, reference))
    return sorted(set(segments), key=lambda s: (s.video, s.start, s.end))


def shard(video: str, start: float, end: float, items: Iterable[Piece]) -> Row:
    """A row of a result file."""
    said = [{"response": piece.text, "start_time": piece.start, "end_time": piece.end} for piece in items]
    return {"video": video, "chunk_start": _whole(start), "chunk_end": _whole(end), "items": said}


def _whole(time: float) -> float | int:
    """As published where it can be: an integer."""
    return int(time) if time == int(time) else time


def merge(rows: Iterable[tuple[str, Row]]) -> dict[str, Result]:
    """One result a video, from shards in any order, each with a name for messages.

    Of two that begin alike the longer one counts; where two overlap, the one that begins first. A lost shard leaves a gap, which is no
    silence: `Result.missing`. Raises UserError for a row of another form.
    """
    found: dict[str, dict[float, Result]] = {}
    for where, row in rows:
        try:
            name, start, end = PurePosixPath(row["video"]).name, parse_seconds(row["chunk_start"]), parse_seconds(row["chunk_end"])
            if end < start or not isinstance(row["items"], list):
                raise ValueError("it ends before it starts" if end < start else "items are no list")
            items = tuple(
                Piece(
                    parse_seconds(item.get("start_time", item["end_time"])),
                    parse_seconds(item["end_time"]),
                    _spoken(item.get("response", item.get("text"))),
                )
                for item in row["items"]
            )
            missing = tuple((parse_seconds(begin), parse_seconds(stop)) for begin, stop in row.get("missing") or ())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: not a row of video, chunk_start, chunk_end and items ({type(error).__name__} {error}): give a result file"
            ) from None
        shards = found.setdefault(name, {})
        if start not in shards or end > shards[start].end:
            shards[start] = Result(start, end, items, missing)
    return {name: _join([shards[start] for start in sorted(shards)]) for name, shards in sorted(found.items())}


def _spoken(text: Any) -> str:
    return "" if text is None else _CLOSING.sub("", " ".join(str(text).split()))


def _join(results: Sequence[Result]) -> Result:
    """`results` in the order of their starts."""
    items: list[Piece] = []
    reached = results[0].start
    for result in results:
        items += (item for item in result.items if result.start >= reached or item.end > reached)
        reached = max(reached, result.end)
    return Result(results[0].start, reached, tuple(items), _gaps(sorted(span for result in results for span in result.spans())))


def _gaps(spans: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """What lies between spans in order; less than a second is none, since whole seconds are compared."""
    gaps, reached = [], spans[0][0]
    for begin, end in spans:
        if begin - reached >= 1:
            gaps.append((reached, begin))
        reached = max(reached, end)
    return tuple(gaps)


def read_results(path: Path) -> dict[str, Result]:
    """A result file, or a folder of shards."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if len(files) > 1:
        files = [file for file in files if file.name != "merged_result.jsonl"]  # made of the others
    if not files:
        raise UserError(f"{path} holds no .jsonl file: give a result file, or a folder of them")
    return merge((f"{file}, row {number}", row) for file in files for number, row in enumerate(read_rows(file), 1))


def merged_bytes(results: Mapping[str, Result]) -> bytes:
    """A result file with a row for each video; gaps are told beside the published keys."""
    lines = []
    for name, result in sorted(results.items()):
        row = shard(name, result.start, result.end, result.items)
        if result.missing:
            row["missing"] = [[_whole(time) for time in gap] for gap in result.missing]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def covers(result: Result | None, segment: Segment) -> bool:
    """Whether the contestant was at work during all of the segment."""
    if result is None or not (int(result.start) <= segment.start and segment.end <= int(result.end)):
        return False
    return not any(int(begin) < segment.end and segment.start < int(end) for begin, end in result.missing)


def said_in(result: Result, start: float, end: float) -> str:
    """The words of the items that end in (start, end], whole seconds compared, as published."""
    return " ".join(item.text for item in result.items if item.text and start < int(item.end) <= end)
