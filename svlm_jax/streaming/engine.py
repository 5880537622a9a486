"""Drivers of the round: the live one, a call a second, and the scan, many rounds in one program. Both run the same two functions.

Nothing on the host grows with the stream: for each row a count of rounds, a few words where a mode needs them, and a key.
"""

import collections
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import compute_dtype
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.placed import mesh_of, new_state, programs_on, rows_sharding
from svlm_jax.streaming.prompt import (
    PromptLayout,
    encode_query,
    encode_stamp,
    encode_time,
    encode_words,
    spoken_ids,
    stamp_capacity,
    stamp_times,
    time_capacity,
)
from svlm_jax.streaming.rows import read_compiled, turned_slots, write_compiled
from svlm_jax.streaming.state import Prompt, StreamState, Turn
from svlm_jax.streaming.step import compiled, decode, ingest
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Array, Key, Params, UInt8


def make_spec(
    model: ModelConfig,
    stream: StreamConfig,
    tokenizer: Tokenizer,
    *,
    height: int,
    width: int,
    watch: Sequence[int] = (),
    query_capacity: int = 0,
) -> StreamSpec:
    """All static settings of an engine, with rooms sized by the tokenizer. `query_capacity`: tokens, where streams bring their own queries."""
    return StreamSpec(
        model=model,
        stream=stream,
        prompt=PromptLayout.from_tokenizer(tokenizer),
        height=height,
        width=width,
        time_capacity=time_capacity(tokenizer),
        query_capacity=max(query_capacity, len(encode_query(tokenizer, stream.query))),
        stamp_capacity=stamp_capacity(tokenizer) if model.vision.stamped else 0,
        initial_words=len(encode_words(tokenizer, stream.previous_text)),
        watch=tuple(watch),
    )


def scan_rounds(
    params: Params, state: StreamState, frames: UInt8[Array, "rounds B F 3 height width"], prompts: Prompt, key: Key[Array, "B"]
) -> tuple[StreamState, Turn]:
    """Many rounds in one program: `lax.scan` over frame steps, each the body of the live loop.

    Every array of `prompts` has a leading axis of rounds, and so has every array of the turns that come back. A first
    round, whose prompt has a query, is a program of another shape: run it before.
    """

    def round(state: StreamState, inputs: tuple[Array, Prompt]) -> tuple[StreamState, Turn]:
        state, _ = ingest(params, state, *inputs, key)
        return decode(params, state, key)

    return jax.lax.scan(round, state, (frames, prompts))


scan_compiled = jax.jit(scan_rounds, donate_argnames="state")


@dataclasses.dataclass
class StreamHost:
    """What the host remembers of one open stream."""

    query: tuple[int, ...] = ()  # asked in its first round
    age: int = 0
    words: int = 0  # tokens put into the previous text, where that is bounded by a capacity
    recent: collections.deque[int] = dataclasses.field(default_factory=collections.deque)  # words of each turn that is not yet in it
    noted: int = 0  # turns that the engine was told of
    memory: list[int] = dataclasses.field(default_factory=list)  # mode "windows": the previous text of the next window

    def as_json(self) -> dict[str, Any]:
        """Lists in the place of tuples and queues."""
        return dataclasses.asdict(self) | {"recent": list(self.recent)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "StreamHost":
        """Of what `as_json` gave."""
        return cls(**{**fields, "query": tuple(fields["query"]), "recent": collections.deque(fields["recent"])})


@dataclasses.dataclass(frozen=True)
class SavedStream:
    """A stream out of its row: all that a later round depends on."""

    state: StreamState  # of a batch of one, its count of rounds included; on the device or the host
    row: StreamHost
    key: np.ndarray  # uint32, the data of the stream's PRNG key
    round: int  # the engine's count of rounds when it was taken


@dataclasses.dataclass(frozen=True)
class Round:
    """One round in flight: its results are on their way from the device."""

    first: Array  # int32 [B], the first tokens
    turn: Turn
    rows: tuple[int, ...]

    def tokens(self) -> dict[int, list[int]]:
        """Each active row's sampled tokens; waits for the device."""
        ids, length = np.asarray(self.turn.tokens), np.asarray(self.turn.length)
        return {row: ids[row, : length[row]].tolist() for row in self.rows}


class Engine:
    """B streams in lock step on one set of compiled programs.

    Streams open and close between rounds, in any row, and no program is compiled anew for it. The engine is where its parameters are:
    on one device, or on a mesh.
    """

    def __init__(self, params: Params, spec: StreamSpec, tokenizer: Tokenizer, *, streams: int = 1, dtype=None, state: StreamState | None = None):
        self.params, self.spec, self.tokenizer = params, spec, tokenizer
        self.mesh = mesh_of(params)
        self.programs: Mapping[str, Callable] = (
            {**compiled, "read_row": read_compiled, "write_row": write_compiled}
            if self.mesh is None
            else programs_on(self.mesh, spec, streams)
        )
        self.state = new_state(spec, streams, dtype or compute_dtype(params), self.mesh) if state is None else state
        self._set_keys([jax.random.key(spec.stream.seed) for _ in range(streams)])
        self._rows: dict[int, StreamHost] = {}
        self._query = encode_query(tokenizer, spec.stream.query)
        self._round = 0 if state is None else int(state.round)  # as the device counts

    def _set_keys(self, keys: Sequence[Key[Array, ""]]) -> None:
        self._keys = list(keys)
        stacked = jnp.stack(self._keys)
        self._key = stacked if self.mesh is None else jax.device_put(stacked, rows_sharding(self.mesh, len(keys)))

    def _set_key(self, row: int, key: Key[Array, ""]) -> None:
        self._set_keys([*self._keys[:row], key, *self._keys[row + 1 :]])

    @property
    def streams(self) -> int:
        return len(self._keys)

    @property
    def open_rows(self) -> tuple[int, ...]:
        return tuple(sorted(self._rows))

    def open(
        self,
        row: int = 0,
        *,
        previous_text: str | None = None,
        words: Sequence[int] | None = None,
        query: str | None = None,
        seed: int | None = None,
    ) -> None:
        """Starts a new stream in `row`; its first round is the next one. Raises UserError if a text does not fit.

        Args:
          previous_text, words: what was said before, as text or in tokens; the settings' own where neither is given.
          query: at most as many tokens as the settings' own, which it stands in for.
        """
        text = self.spec.stream.previous_text if previous_text is None else previous_text
        asked = self._query if query is None else encode_query(self.tokenizer, query)
        if len(asked) > self.spec.query_capacity:
            raise UserError(f"the query of stream {row} has {len(asked)} tokens and {self.spec.query_capacity} fit: shorten it")
        known = list(encode_words(self.tokenizer, text) if words is None else words)
        self._open(row, known)
        self._set_key(row, jax.random.key(self.spec.stream.seed if seed is None else seed))
        self._rows[row] = StreamHost(query=asked, words=len(known), memory=known)

    def _open(self, row: int, words: list[int]) -> None:
        capacity = self.spec.cache.words_capacity
        if len(words) > capacity:
            raise UserError(f"the previous text has {len(words)} tokens and {capacity} fit: shorten it or raise --text-sink or --text-sliding")
        padded = np.zeros(capacity, np.int32)
        padded[: len(words)] = words
        self.state = self.programs["open_stream"](
            self.params, self.state, np.asarray(row, np.int32), padded, np.asarray(len(words), np.int32)
        )

    def close(self, row: int = 0) -> None:
        """Ends the stream in `row` and empties it."""
        del self._rows[row]
        self.state = self.programs["close_stream"](self.state, np.asarray(row, np.int32))

    def take(self, row: int = 0) -> SavedStream:
        """A copy of the stream in `row` as it is between rounds; the stream itself goes on."""
        state = self.programs["read_row"](self.state, np.asarray(row, np.int32))
        return SavedStream(state, copy.deepcopy(self._rows[row]), np.asarray(jax.random.key_data(self._keys[row])), self._round)

    def put(self, row: int, saved: SavedStream) -> None:
        """Has a stream go on in `row`, which must not be open. In an engine without streams, everything is bit for bit as it was."""
        if row in self._rows:
            raise ValueError(f"row {row} has a stream")
        if not self._rows:
            self._round = saved.round
            self.state = self.state.replace(round=jnp.asarray(saved.round, jnp.int32))
        order = turned_slots(self.spec.cache, self._round - saved.round)
        self.state = self.programs["write_row"](self.state, saved.state, np.asarray(row, np.int32), order)
        self._set_key(row, jax.random.wrap_key_data(jnp.asarray(saved.key)))
        self._rows[row] = copy.deepcopy(saved.row)

    def prompt(self, times: Mapping[int, tuple[float, float]], questions: Mapping[int, str] | None = None) -> Prompt:
        """The arrays of one round from each open row's (start, end) in seconds, and questions in mid-stream."""
        spec, streams = self.spec, self.streams
        if set(times) != set(self._rows):
            raise ValueError(f"rows {sorted(self._rows)} are open, but times are given for {sorted(times)}")

        def ragged(ids: Mapping[int, Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
            padded, length = np.zeros((streams, size), np.int32), np.zeros(streams, np.int32)
            for row, tokens in ids.items():
                padded[row, : len(tokens)], length[row] = tokens, len(tokens)
            return padded, length

        time, time_length = ragged({row: encode_time(self.tokenizer, *t) for row, t in times.items()}, spec.time_capacity)
        active = np.zeros(streams, bool)
        active[list(times)] = True
        question = question_length = query = query_length = stamp = stamp_length = None
        if questions and not spec.stream.question_capacity:
            raise UserError("this stream has no room for questions: make it with a question_capacity, in tokens")
        if spec.stream.question_capacity:  # in every round, so that asking compiles nothing
            asked = {row: encode_query(self.tokenizer, text) for row, text in (questions or {}).items()}
            for row, ids in asked.items():
                if len(ids) > spec.stream.question_capacity:
                    raise UserError(f"the question of stream {row} has {len(ids)} tokens and {spec.stream.question_capacity} fit: shorten it")
            question, question_length = ragged(asked, spec.stream.question_capacity)
        if any(self._rows[row].query and self._rows[row].age == 0 for row in times):
            query, query_length = ragged({row: self._rows[row].query for row in times if self._rows[row].age == 0}, spec.query_capacity)
        if spec.model.vision.stamped:
            s, shape = spec.stream, (streams, len(spec.visuals))
            stamp, stamp_length = np.zeros((*shape, spec.stamp_capacity), np.int32), np.zeros(shape, np.int32)
            for row, (start, _) in times.items():
                for index, seconds in enumerate(stamp_times(start, s.frames_per_round, s.fps)):
                    ids = encode_stamp(self.tokenizer, seconds)
                    stamp[row, index, : len(ids)], stamp_length[row, index] = ids, len(ids)
        return Prompt(time, time_length, active, question, question_length, query, query_length, stamp, stamp_length)

    def ingest(self, frames: UInt8[Array, "B F 3 height width"], prompt: Prompt) -> Array:
        """A round up to its first tokens, int32 [B]; enqueued, not awaited."""
        for row in self._rows.values():
            self._check_capacity(row)
        self.state, first = self.programs["ingest"](self.params, self.state, frames, prompt, self._key)
        return first

    def decode(self) -> Turn:
        """The rest of the round; enqueued, not awaited."""
        self.state, turn = self.programs["decode"](self.params, self.state, self._key)
        self._round += 1
        for row in self._rows.values():
            row.age += 1
        return turn

    def step(
        self,
        frames: UInt8[Array, "B F 3 height width"],
        times: Mapping[int, tuple[float, float]],
        questions: Mapping[int, str] | None = None,
        *,
        begun: Callable[[Array], object] | None = None,
    ) -> Round:
        """One round: both programs enqueued back to back. The host may prepare the next round while the device works.

        `begun` is called in between with the first tokens, int32 [B], which are on their way: to enqueue the second program, a loop, can
        take until it ends, so who wants to tell them early waits for them in another thread.
        """
        if self.spec.stream.mode == "windows":
            self._restart_windows()
        prompt = self.prompt(times, questions)
        first = self.ingest(frames, prompt)
        first.copy_to_host_async()
        if begun is not None:
            begun(first)
        turn = self.decode()
        jax.tree.map(lambda a: a.copy_to_host_async(), turn)
        return Round(first, turn, tuple(sorted(times)))

    def note(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Tells the engine what a round said; needed where words are bounded by a capacity, or carried by the host ("windows")."""
        s = self.spec.stream
        for row_index, ids in tokens.items():
            row = self._rows[row_index]
            words = list(ids)[:-2] if ids and ids[-1] == self.spec.prompt.im_end else list(ids)[:-1]
            if s.mode == "windows":
                row.memory += words
                if s.text_sink is not None and s.text_sliding is not None and len(row.memory) > s.text_sink + s.text_sliding - 1:
                    row.memory = row.memory[: s.text_sink] + row.memory[len(row.memory) - s.text_sliding + 1 :]
            elif s.mode != "full" and s.text_sink is None:
                row.recent.append(len(words))
                row.noted += 1

    def _restart_windows(self) -> None:
        """Mode "windows": a full window starts anew with the system prompt and the previous text, cut as in training."""
        for index, row in self._rows.items():
            if row.age and row.age % self.spec.cache.vision_window == 0:
                self._open(index, row.memory)
                row.age = 0

    def _check_capacity(self, row: StreamHost) -> None:
        s = self.spec.stream
        if s.mode == "full" and row.age >= s.capacity_rounds:
            raise UserError(
                f"--mode full holds {s.capacity_rounds} rounds and this stream has reached them: raise --capacity-rounds or use --mode streaming"
            )
        while row.recent and row.noted - len(row.recent) <= row.age - s.text_window:  # what the next eviction moves into the text
            row.words += row.recent.popleft()
        if s.mode in ("streaming", "recompute") and s.text_sink is None and row.words > self.spec.cache.sink:
            raise UserError(
                f"the previous text has outgrown its {self.spec.cache.sink} tokens: set --text-sink and --text-sliding, or raise --text-capacity"
            )

    def spoken(self, tokens: Sequence[int]) -> str:
        """The words of a turn, without ` ...` and structural tokens."""
        return self.tokenizer.decode(spoken_ids(tokens, self.spec.prompt)).strip()
