"""Who is compared: a checkpoint of ours, result files of anybody's, or a server that takes pictures."""

import base64
import collections
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from svlm_jax.data.video import read_rounds
from svlm_jax.errors import UserError
from svlm_jax.evaluation.endpoint import Endpoint, Line, Message, parse_endpoint
from svlm_jax.evaluation.inf_streams import Piece
from svlm_jax.evaluation.journal import Journal, Row
from svlm_jax.evaluation.watch import Record, Watch

History = Literal["own", "reference", "none"]
PUBLISHED_RATE, PUBLISHED_ROWS, PUBLISHED_FRAMES = 0.25, 360, 60  # frames a second, pixels high, a request: what GPT-4o mini was shown
PUBLISHED = {"temperature": 0.9, "repetition_penalty": 1.05, "text_sink": 512, "text_sliding": 512}  # how the checkpoint was run there
JPEG_QUALITY = 85
COMMENTATOR = (
    "You are a live sports commentator on air. Say, in plain text and in the language of the request, what the pictures show as it happens: "
    "a few short, lively sentences in the present tense. Name nothing that cannot be seen or was not said before."
)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A side of the comparison. Just one of the three is set."""

    name: str
    model: str | None = None  # a directory, or a name on the Hub; "demo" is the tiny one, whose words mean nothing
    results: Path | None = None  # a file or a folder
    endpoint: Endpoint | None = None


def parse_contestant(text: str) -> Contestant:
    """URL#MODEL, a result file or folder, or else a checkpoint; each may stand after NAME=. Raises UserError for none of them."""
    name, equals, where = text.partition("=")
    if not equals or "/" in name or ":" in name:
        name, where = "", text
    if where.startswith(("http://", "https://")):
        endpoint = parse_endpoint(where)
        return Contestant(name or endpoint.model, endpoint=endpoint)
    path = Path(where)
    if path.suffix == ".jsonl" or (path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.jsonl"))):
        if not path.exists():
            raise UserError(f"{path}: there is no such result file: check the path")
        return Contestant(name or path.stem, results=path)
    if not where:
        raise UserError(f"{text!r} names no contestant: give a checkpoint, a result file or URL#MODEL")
    return Contestant(name or path.name, model=where)


@dataclasses.dataclass(frozen=True)
class Showing:
    """What a server is shown of each window, and told of what was said before."""

    fps: float
    max_pixels: int
    rows: int | None  # pixels of height at most
    frames: int | None  # at most, evenly spread
    history: History
    seconds: float  # a request


def showing(setting: Literal["fair", "published"], fps: float, max_pixels: int, seconds: float, endless: bool) -> Showing:
    """`fair`: the frames, rate and history of the checkpoint. `published`: what GPT-4o mini had in arXiv 2510.09608's comparison."""
    if setting == "published":
        return Showing(PUBLISHED_RATE, max_pixels, PUBLISHED_ROWS, PUBLISHED_FRAMES, "none", seconds)
    return Showing(fps, max_pixels, None, None, "own" if endless else "reference", seconds)


def pictures(watch: Watch, shown: Showing) -> list[Message]:
    """The frames of a stretch of video as parts of a message."""
    count = max(1, math.floor((watch.end - watch.start) * shown.fps + 1e-9))
    stride = 1 if shown.frames is None else -(-count // shown.frames)
    parts: list[Message] = []
    rounds = read_rounds(
        watch.video,
        fps=shown.fps / stride,
        chunk_seconds=stride / shown.fps,
        max_pixels=shown.max_pixels,
        start=watch.start,
        duration=watch.end - watch.start,
    )
    try:
        for video in rounds:
            picture = Image.fromarray(video.frames[0])
            if shown.rows is not None and picture.height > shown.rows:
                picture = picture.resize((max(1, round(picture.width * shown.rows / picture.height)), shown.rows), Image.Resampling.BOX)
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=JPEG_QUALITY)
            url = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
    except UserError:  # the video ends early, or before the stretch begins
        pass
    return parts


class Asking:
    """A server at work on all watches: one request for each `seconds` of each, those of one watch in order, watches in parallel."""

    def __init__(
        self,
        endpoint: Endpoint,
        watches: Sequence[Watch],
        shown: Showing,
        journal: Journal,
        record: Callable[[Record], Row],
        *,
        query: str,
        cut: Callable[[str], str],
        temperature: float | None,
        partial: bool = True,
        workers: int = 8,
        told: Callable[[int, float], None] = lambda done, total: None,
    ):
        """The journal's rows of results are those of `record`; each keeps a request's tokens and failures as well.

        Args:
          cut: shortens what was said before as the checkpoint's settings do.
          partial: a row for each request, or one for each watch, which then is one request.
        """
        self.watches, self.shown, self.journal, self.record = list(watches), shown, journal, record
        self.query, self.cut, self.partial, self.workers, self.told = query, cut, partial, workers, told
        self.line = Line(endpoint, temperature)
        self.before: dict[tuple[Any, ...], Row] = {self._key(row): row for row in journal.rows}
        self.total = sum(len(self._windows(watch)) for watch in self.watches)
        self.done = 0

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("video", "chunk_start", "video_id", "event_id"))

    def _windows(self, watch: Watch) -> list[Watch]:
        step = self.shown.seconds if self.partial else watch.end - watch.start
        starts = [watch.start + i * step for i in range(max(1, math.ceil((watch.end - watch.start) / step - 1e-9)))]
        return [dataclasses.replace(watch, start=start, end=min(start + step, watch.end)) for start in starts]

    def run(self) -> None:
        """Raises UserError when the endpoint cannot be asked any more; answers by then are kept."""
        with ThreadPoolExecutor(max(1, self.workers), "ask") as pool:
            work = [pool.submit(self._one, watch) for watch in self.watches]
            try:
                for future in as_completed(work):
                    future.result()
            except BaseException:
                self.line.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _one(self, watch: Watch) -> None:
        said: list[str] = []
        for window in self._windows(watch):
            empty = self.record(Record(window, window.start, window.end, []))
            row = self.before.get(self._key(empty))
            if row is None:
                row = self._ask(window, watch, said)
                self.journal.append(row)
            said.append(str(row["asked"]["answer"]))
            self.done += 1
            self.told(self.done, self.total)

    def _ask(self, window: Watch, watch: Watch, said: Sequence[str]) -> Row:
        frames = pictures(window, self.shown)
        failures: collections.Counter[str] = collections.Counter()
        if not frames:  # the video has ended: results end here, and the report counts it
            return self.record(Record(window, window.start, window.start, [])) | {"asked": {"answer": ""}}
        history = {"none": "", "reference": watch.previous, "own": " ".join((watch.previous, *said))}[self.shown.history]
        head = (
            f"{window.query or self.query}\nThe pictures are {self.shown.fps:g} a second, from {window.start:.1f} s to {window.end:.1f} s."
        )
        if history := self.cut(history.strip()):
            head += f"\nWhat was said before: {history}"
        messages: list[Message] = [
            {"role": "system", "content": COMMENTATOR},
            {"role": "user", "content": [{"type": "text", "text": head}, *frames]},
        ]
        reply = self.line.request(messages, lambda failure: failures.update([failure.kind]))
        text = "" if reply.refused else " ".join(reply.text.split())
        asked = {"answer": text, "refused": reply.refused, "tokens": [reply.prompt_tokens, reply.answer_tokens], "failures": dict(failures)}
        return self.record(Record(window, window.start, window.end, [Piece(window.start, window.end, text)])) | {"asked": asked}
