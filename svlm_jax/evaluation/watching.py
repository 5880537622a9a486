"""A checkpoint at work on many stretches of video: each is a stream of its own, and as many as there are rows run as one batch.

Every so many rounds the results so far are appended to a journal, and then the engine is saved. A run that was killed goes on from
there with the same numbers in the same rows: what it says is what an undisturbed run would have said, and nothing is written twice.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from svlm_jax.checkpoints.load import LoadedModel
from svlm_jax.config import StreamConfig
from svlm_jax.data.resize import MIN_PIXELS, resized_size
from svlm_jax.data.samples import cut_words
from svlm_jax.data.video import Round as VideoRound
from svlm_jax.data.video import probe, read_ahead, read_rounds
from svlm_jax.errors import UserError
from svlm_jax.evaluation.inf_streams import Piece
from svlm_jax.evaluation.journal import Journal, Row
from svlm_jax.evaluation.watch import Record, Watch
from svlm_jax.programs import check_memory
from svlm_jax.streaming.engine import Engine, Round, make_spec
from svlm_jax.streaming.layout import round_up
from svlm_jax.streaming.placed import check_streams, mesh_of
from svlm_jax.streaming.prompt import encode_query, encode_words
from svlm_jax.streaming.snapshot import load_engine, read_note, save_engine, write_snapshot

EVERY = 300  # rounds between two savings
QUERY_TILE = 64  # tokens: room for queries comes in steps, so that few programs are compiled
Size = tuple[int, int]  # height and width in pixels


@dataclasses.dataclass
class _Open:
    """A watch that a row is at work on."""

    watch: int  # its index
    rounds: int = 0  # done
    items: list[Piece] = dataclasses.field(default_factory=list)  # since the last record
    since: float = 0.0  # where the next record begins
    reached: float = 0.0  # where the last round ended
    video: Iterator[VideoRound] = dataclasses.field(default_factory=lambda: iter(()))
    ahead: VideoRound | None = None

    def note(self) -> list[Any]:
        return [self.watch, self.rounds, self.items, self.since, self.reached]


def frame_size(video: str, max_pixels: int, factor: int) -> Size:
    """What the frames of a video are resized to. Raises UserError for what cannot be read."""
    info = probe(video)
    return resized_size(info.height, info.width, factor=factor, min_pixels=min(MIN_PIXELS, max_pixels), max_pixels=max_pixels)


class Watching:
    """Goes through all watches, those with frames of one size together. `run` once."""

    def __init__(
        self,
        model: LoadedModel,
        watches: Sequence[Watch],
        config: StreamConfig,
        journal: Journal,
        record: Callable[[Record], Row],
        *,
        streams: int = 1,
        every: int = EVERY,
        partial: bool = True,
        told: Callable[[int, float], None] = lambda rounds, total: None,
    ):
        """Looks at every video. Raises UserError before any work where one cannot be read.

        Args:
          record: makes a journal's row of results. With `partial`, a watch may have several, one after the other; else one, at its end.
          told: hears after every round how many are done and how many there are, all streams' together.
        """
        self.model, self.watches, self.journal, self.record = model, list(watches), journal, record
        self.streams, self.every, self.partial, self.told = streams, every, partial, told
        self._query, self.config = config.query, config
        self.config = self._fit(config)
        self.path = journal.path.with_name("engine.npz")
        factor = model.config.vision.merged_patch_size
        sizes = {video: frame_size(video, config.max_pixels, factor) for video in dict.fromkeys(w.video for w in watches)}
        by_size: dict[Size, list[int]] = {}
        for index, watch in enumerate(self.watches):
            by_size.setdefault(sizes[watch.video], []).append(index)
        self.groups = list(by_size.items())
        self.total = sum(self._rounds(watch) for watch in self.watches)
        self.done = 0

    def _rounds(self, watch: Watch) -> int:
        return max(0, math.ceil((watch.end - watch.start) / self.config.chunk_seconds - 1e-9))

    def _fit(self, config: StreamConfig) -> StreamConfig:
        """In mode "full", room for the longest watch. Query and previous text are each stream's own."""
        if config.mode == "full":
            rounds = max([2, *(self._rounds(watch) + 1 for watch in self.watches)])
            config = dataclasses.replace(config, capacity_rounds=rounds)
        return dataclasses.replace(config, question_capacity=0, previous_text="", query="")

    def query(self, watch: Watch) -> str:
        return self._query if watch.query is None else watch.query

    def words(self, watch: Watch) -> list[int]:
        """The previous text in tokens, cut to the first and the last ones that the settings keep."""
        return cut_words(encode_words(self.model.tokenizer, watch.previous), self.config.text_sink, self.config.text_sliding)

    def run(self) -> None:
        """Raises UserError as the engine and the journal do."""
        note = read_note(self.path)
        if note is None:
            note = {"size": 0, "group": 0, "next": 0, "open": {}, "done": 0, "engine": False}
        elif note.get("watches") != len(self.watches):
            raise UserError(f"{self.path} is of a run over {note.get('watches')} stretches, not {len(self.watches)}: use another folder")
        self.journal.cut(note["size"])  # what was written after the engine was saved comes again, the same
        self.done = note["done"]
        while note["group"] < len(self.groups):
            self._run_group(note)
            note = self._note(note["group"] + 1, 0, None)
            write_snapshot(self.path, {"note": note})

    def _note(self, group: int, next_watch: int, rows: dict[int, _Open] | None) -> dict[str, Any]:
        """Where the run stands. `rows` are those of the engine that is saved beside it; None where none is, between two groups."""
        return {
            "size": self.journal.size,
            "group": group,
            "next": next_watch,
            "open": {row: each.note() for row, each in (rows or {}).items()},
            "done": self.done,
            "watches": len(self.watches),
            "engine": rows is not None,
        }

    def _engine(self, size: Size, indices: Sequence[int]) -> Engine:
        """With room for the longest query, in steps, and for the longest previous text."""
        spec = make_spec(self.model.config, self.config, self.model.tokenizer, height=size[0], width=size[1])
        queries = (encode_query(self.model.tokenizer, self.query(self.watches[index])) for index in indices)
        spec = dataclasses.replace(spec, query_capacity=round_up(max(map(len, queries)), QUERY_TILE))
        longest = max(len(self.words(self.watches[index])) for index in indices)
        if longest > spec.cache.words_capacity:
            spec = dataclasses.replace(spec, initial_words=longest)
        mesh = mesh_of(self.model.params)
        check_streams(mesh, self.streams)
        check_memory(spec, 0, jax.tree.leaves(self.model.params)[0].dtype, streams=self.streams, mesh=mesh)
        return Engine(self.model.params, spec, self.model.tokenizer, streams=self.streams)

    def _run_group(self, note: dict[str, Any]) -> None:
        size, indices = self.groups[note["group"]]
        engine = self._engine(size, indices)
        rows: dict[int, _Open] = {}
        if note["engine"]:  # also with no row open: where in its rings an engine stands decides how its sums are rounded
            load_engine(engine, self.path)
        with contextlib.ExitStack() as readers:
            for row, (watch, rounds, items, since, reached) in sorted((int(row), each) for row, each in note["open"].items()):
                rows[row] = _Open(watch, rounds, [Piece(*item) for item in items], since, reached)
                self._read(rows[row], size, readers)
            _Group(self, engine, size, indices, rows, note["next"], note["group"], readers).run()

    def _read(self, opened: _Open, size: Size, readers: contextlib.ExitStack) -> None:
        """Begins to read where the rounds that are done end."""
        watch, s = self.watches[opened.watch], self.config
        start = watch.start + opened.rounds * s.chunk_seconds
        if start < watch.end:
            rounds = read_rounds(watch.video, fps=s.fps, chunk_seconds=s.chunk_seconds, start=start, duration=watch.end - start, size=size)
            opened.video = read_ahead(rounds)
            readers.callback(opened.video.close)  # type: ignore[attr-defined]
        self.look_ahead(opened)

    def look_ahead(self, opened: _Open) -> None:
        """The next round's frames; None where the stretch, or the video itself, has ended."""
        try:
            opened.ahead = next(opened.video, None)
        except UserError:  # the video is shorter than the reference, or damaged: the results end here, and the report counts it
            opened.ahead = None


@dataclasses.dataclass
class _Group:
    """The watches of one frame size, on one engine."""

    whole: Watching
    engine: Engine
    size: Size
    indices: Sequence[int]
    rows: dict[int, _Open]
    next: int  # in `indices`
    number: int
    readers: contextlib.ExitStack
    ended: list[_Open] = dataclasses.field(default_factory=list)  # with results that are not yet in the journal

    def run(self) -> None:
        settings = self.whole.config
        eager = settings.mode == "windows" or settings.text_sink is None  # the engine must hear what a round said before the next one
        waiting: tuple[Round, dict[int, tuple[_Open, VideoRound]]] | None = None
        since_saved = 0
        self._close()
        while True:
            self._fill()
            if not self.rows:
                break
            now = {row: (each, each.ahead) for row, each in self.rows.items() if each.ahead is not None}
            sent = self.engine.step(self._frames(now), {row: (video.start, video.end) for row, (_, video) in now.items()})
            for each, _ in now.values():
                each.rounds += 1
                self.whole.look_ahead(each)  # while the device works
            if waiting is not None:
                self._finish(*waiting)
            waiting = sent, now
            since_saved += 1
            save = since_saved == self.whole.every
            if eager or save:
                self._finish(*waiting)
                waiting = None
            self._close()
            if save:
                self._save()
                since_saved = 0
        if waiting is not None:
            self._finish(*waiting)
        self.whole.journal.append(*self._records())

    def _fill(self) -> None:
        """Opens the next watches in rows that are free."""
        for row in range(self.whole.streams):
            while row not in self.rows and self.next < len(self.indices):
                index = self.indices[self.next]
                self.next += 1
                watch = self.whole.watches[index]
                opened = _Open(index, since=watch.start, reached=watch.start)
                self.whole._read(opened, self.size, self.readers)
                if opened.ahead is None:
                    self.ended.append(opened)
                    continue
                seed = self.whole.config.seed + index
                self.engine.open(row, words=self.whole.words(watch), query=self.whole.query(watch), seed=seed)
                self.rows[row] = opened

    def _close(self) -> None:
        for row, each in list(self.rows.items()):
            if each.ahead is None:
                self.engine.close(row)
                self.ended.append(self.rows.pop(row))

    def _frames(self, now: dict[int, tuple[_Open, VideoRound]]) -> np.ndarray:
        """uint8 [B, F, 3, height, width]; rows that are free stay black."""
        batch = np.zeros((self.whole.streams, self.whole.config.frames_per_round, 3, *self.size), np.uint8)
        for row, (_, video) in now.items():
            batch[row] = video.frames.transpose(0, 3, 1, 2)
        return batch

    def _finish(self, sent: Round, now: dict[int, tuple[_Open, VideoRound]]) -> None:
        """Waits for what a round said."""
        tokens = sent.tokens()
        self.engine.note({row: ids for row, ids in tokens.items() if row in self.rows and self.rows[row] is now[row][0]})
        for row, (each, video) in now.items():
            end = min(video.end, self.whole.watches[each.watch].end)
            each.items.append(Piece(video.start, end, self.engine.spoken(tokens[row])))
            each.reached = end
        self.whole.done += len(now)
        self.whole.told(self.whole.done, self.whole.total)

    def _records(self) -> list[Row]:
        """What is to be written by now, in the order of the watches, and taken off the hands of whoever holds it."""
        ready = [*self.ended, *(each for each in self.rows.values() if self.whole.partial and each.items)]
        records = []
        for each in sorted(ready, key=lambda each: each.watch):
            records.append(self.whole.record(Record(self.whole.watches[each.watch], each.since, each.reached, each.items)))
            each.items, each.since = [], each.reached
        self.ended.clear()
        return records

    def _save(self) -> None:
        self.whole.journal.append(*self._records())
        save_engine(self.engine, self.whole.path, self.whole._note(self.number, self.next, self.rows))
