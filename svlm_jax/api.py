"""A video and a model in, captions out: `load`, `stream`, and `Commentary`, which tells more about every round."""

import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from svlm_jax.captions import Caption
from svlm_jax.checkpoints import load as checkpoint
from svlm_jax.checkpoints.hub_config import read_config
from svlm_jax.checkpoints.load import LoadedModel
from svlm_jax.checkpoints.run_form import described_in
from svlm_jax.checkpoints.source import open_source
from svlm_jax.checkpoints.stream_settings import read_stream_settings
from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.data.resize import MIN_PIXELS, resized_size
from svlm_jax.data.video import Round as VideoRound
from svlm_jax.data.video import VideoInfo, probe, read_ahead, read_rounds
from svlm_jax.demo.bundle import model_path
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import Quantization, as_quantization, quantized_shapes, quantized_shardings
from svlm_jax.model.qwen_vl import abstract_params, compute_dtype
from svlm_jax.programs import Kind, Programs, check_memory, device_bytes, free_memory, size_text, tree_bytes
from svlm_jax.sharding import param_shardings
from svlm_jax.storage import Place
from svlm_jax.streaming.engine import Engine, make_spec
from svlm_jax.streaming.engine import Round as EngineRound
from svlm_jax.streaming.placed import mesh_of, rows_sharding
from svlm_jax.streaming.prompt import encode_query
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Params

Source = str | os.PathLike[str]
Quantize = str | Quantization | None
Question = tuple[float, str]  # seconds from the start of the video, and what is asked
SPEED_ROUNDS = 16  # the speed is that of so many rounds


def random_weights(folder: Place) -> bool:
    """Whether the model's card says that it has learnt nothing."""
    with contextlib.suppress(OSError, ValueError):
        return "weights are random" in (folder / "README.md").read_text(encoding="utf-8")
    return False


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model that is known, and checked against its weight files' headers, but not in memory."""

    path: Place
    weights: Place
    config: ModelConfig  # as it runs: on a mesh, key-value heads may be repeated
    stored: ModelConfig  # as the files have it
    tokenizer: Tokenizer
    dtype: np.dtype  # of the parameters once loaded
    quantization: Quantization | None = None
    mesh: Mesh | None = None  # that it is spread over

    @classmethod
    def open(
        cls,
        path: Source | None = None,
        *,
        weights: Source | None = None,
        dtype: Any = None,
        quantize: Quantize = None,
        mesh: Mesh | None = None,
    ) -> "Checkpoint":
        """Looks at config, tokenizer and headers. Raises UserError where they are missing, or do not go with each other or with the mesh."""
        folder, name = checkpoint.find(model_path() if path is None else os.fspath(path))
        config = read_config(folder, name=name)
        source = folder if weights is None else checkpoint.find(os.fspath(weights))[0]
        opened = open_source(source, config, dtype=dtype)
        tokenizer = Tokenizer.load(described_in(folder))
        mesh = mesh if mesh is not None and mesh.size > 1 else None
        spread = checkpoint.on_mesh(config, mesh)
        return cls(folder, source, spread, config, tokenizer, opened.dtype, as_quantization(quantize) or opened.quantization, mesh)

    @property
    def shapes(self) -> Params:
        """Of the parameters once loaded; on a mesh, with their shardings."""
        shapes = quantized_shapes(abstract_params(self.config, dtype=self.dtype), self.quantization)
        if self.mesh is None:
            return shapes
        places = quantized_shardings(param_shardings(self.config, self.mesh), self.quantization)
        return jax.tree.map(lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places)

    @property
    def nbytes(self) -> int:
        """Of the parameters once loaded, on all devices together."""
        return tree_bytes(self.shapes)

    def load(self, progress: checkpoint.Progress | None = None) -> LoadedModel:
        """Reads the parameters onto the default device, or the mesh. `progress` is called with bytes done and in total."""
        how: dict[str, Any] = {"dtype": self.dtype, "quantize": self.quantization, "progress": progress}
        if self.weights == self.path:
            return checkpoint.load(self.path, mesh=self.mesh, **how)
        params = (
            checkpoint.load_params(self.weights, self.stored, **how)
            if self.mesh is None
            else checkpoint.load_on_mesh(self.weights, self.stored, self.mesh, **how)
        )
        return LoadedModel(self.config, params, self.tokenizer, self.path)


def load(
    path: Source | None = None,
    *,
    weights: Source | None = None,
    dtype: Any = None,
    quantize: Quantize = None,
    mesh: Mesh | None = None,
    progress: checkpoint.Progress | None = None,
) -> LoadedModel:
    """The model in a directory or bucket, of Hugging Face's form or Orbax's (or of that name on the Hub), ready for `stream`.

    Args:
      path: None is the bundled model, which this project trained on simulated matches and which knows nothing else.
      weights: another directory to take the weights from; config and tokenizer stay those of `path`.
      dtype: of the parameters, the cache and the computation; None keeps what the files hold.
      quantize: "int8" or "fp8" keeps the weights of the decoder's products and of the head in eight bits, and so makes decoding
        faster on less memory; "fp8_products" those of vision too, and multiplies prefill and vision in eight bits; a `Quantization` says
        which parts. None keeps all as it is.
      mesh: devices that share the model, from `svlm_jax.sharding.make_mesh(data=..., tensor=...)`; None: the first one alone.
      progress: called with (bytes done, bytes in total) while weights are read.

    Raises UserError, one line, for what is wrong with the checkpoint, or where it does not fit into memory.
    """
    found = Checkpoint.open(path, weights=weights, dtype=dtype, quantize=quantize, mesh=mesh)
    free, needed = free_memory(), device_bytes(found.shapes)
    if free is not None and needed > free:
        need, have = size_text(needed), size_text(free)
        raise UserError(f"the weights in {found.weights} need {need} and {have} are free: use a smaller model")
    return found.load(progress)


def stream(source: Source, model: LoadedModel | Source | None = None, **settings: Any) -> Iterator[Caption]:
    """What the model says about a video, one `Caption` a round, in order; a silent round's text is ''.

    Settings are the fields of `StreamConfig`, and those of `Commentary`: start, duration, questions. Video, model and settings are
    checked at the call, which raises UserError; work begins with the first caption. A damaged video raises TruncatedVideo after the
    captions of what was readable.
    """
    commentary = Commentary(source, model, **settings)
    return (said.caption for said in commentary)


@dataclasses.dataclass(frozen=True)
class Said:
    """One round of commentary."""

    caption: Caption
    tokens: tuple[int, ...]  # all sampled ones, the closing <|im_end|> included
    cached: int  # tokens in the cache after the round
    cache_fill: float  # the share of its slots that they take, 0 to 1
    speed: float  # seconds of video a second, over the last rounds
    broken: int  # pieces of this round's video that could not be read


class Commentary:
    """One video and one model: a `Said` a round. The constructor checks; `load` and `prepare` make ready, or iterating does; iterate once.

    While the device works on a round, the next one's frames are read and its programs enqueued; so with a file each round is handed out
    when the next is on its way. A live source is never kept waiting for its next round.
    """

    def __init__(
        self,
        source: Source,
        model: LoadedModel | Source | None = None,
        *,
        weights: Source | None = None,
        dtype: Any = None,
        quantize: Quantize = None,
        mesh: Mesh | None = None,
        start: float = 0.0,
        duration: float | None = None,
        questions: Iterable[Question] = (),
        **settings: Any,
    ):
        """Checks all that can be checked before anything large is read or allocated. Raises UserError.

        Args:
          source: a file or URL.
          model: from `load`, or what `load` takes (then also `weights`, `dtype`, `quantize` and `mesh`).
          start, duration: the part of the video to caption, in seconds.
          questions: (time in seconds, text): each is put to the model in the round that contains its time.
          settings: fields of StreamConfig; what is not given is as the model's `streaming.json` has it, if it has one. In mode "full",
            capacity_rounds is the video's length unless given.
        """
        self.model = model if isinstance(model, LoadedModel) else None
        how: dict[str, Any] = {"weights": weights, "dtype": dtype, "quantize": quantize, "mesh": mesh}
        self.checkpoint = None if isinstance(model, LoadedModel) else Checkpoint.open(model, **how)
        known = self.model or self.checkpoint
        assert known is not None
        settings = {**read_stream_settings(known.path), **settings}
        config = stream_config(settings)
        self.source, self.start = os.fspath(source), float(start)
        self.info: VideoInfo = probe(self.source)
        ends = [t for t in (self.info.duration, None if duration is None else start + duration) if t is not None]
        self.end = min(ends) if ends else None  # seconds, None for a live source
        self.live = self.info.duration is None or "://" in self.source
        if config.mode == "full" and "capacity_rounds" not in settings and self.end is not None:
            rounds = math.ceil((self.end - start) / config.chunk_seconds) + 1  # containers round their durations
            config = dataclasses.replace(config, capacity_rounds=max(2, rounds))
        self.path, tokenizer = known.path, known.tokenizer
        self.mesh = self.checkpoint.mesh if self.checkpoint else mesh_of(known.params)  # type: ignore[union-attr]
        self._questions = self._placed(questions, config)
        asked = max((len(encode_query(tokenizer, text)) for text in self._questions.values()), default=0)
        room = max(config.question_capacity, asked) if self._questions else 0  # each round runs the room, asked or not
        config = dataclasses.replace(config, question_capacity=room)
        size = resized_size(
            self.info.height,
            self.info.width,
            factor=known.config.vision.merged_patch_size,
            min_pixels=min(MIN_PIXELS, config.max_pixels),
            max_pixels=config.max_pixels,
        )
        self.spec = make_spec(known.config, config, tokenizer, height=size[0], width=size[1])
        self.dtype = self.checkpoint.dtype if self.checkpoint else np.dtype(compute_dtype(model.params))  # type: ignore[union-attr]
        check_memory(self.spec, device_bytes(self.checkpoint.shapes) if self.checkpoint else 0, self.dtype, mesh=self.mesh)
        self._place = None if self.mesh is None else rows_sharding(self.mesh, 1)  # of frames; None: the default device
        self._duration = duration
        self._engine: Engine | None = None
        self._programs: Programs | None = None
        self._rounds: Iterator[tuple[VideoRound, jax.Array]] = iter(())
        self._first: tuple[VideoRound, jax.Array] | None = None
        self._marks: collections.deque[tuple[float, float]] = collections.deque(maxlen=SPEED_ROUNDS + 1)
        self._compiling = 0.0  # seconds spent waiting for programs, which the speed leaves out

    def load(self, progress: checkpoint.Progress | None = None) -> None:
        """Reads the first frames and the weights, and begins to compile. UserError for a video that cannot be read from `start` on."""
        if self._programs is not None:
            return
        self._rounds = read_ahead(self._read())
        self._first = next(self._rounds, None)
        known = self.model or self.checkpoint
        assert known is not None
        params = known.params if isinstance(known, LoadedModel) else known.shapes
        self._programs = Programs(self.spec, params, self.dtype, self._kinds())
        if self.model is None and self.checkpoint is not None:
            self.model = self.checkpoint.load(progress)

    def prepare(self) -> None:
        """Allocates the stream's state and waits for the programs of the first round."""
        self.load()
        if self._engine is not None:
            return
        assert self.model is not None and self._programs is not None
        engine = Engine(self.model.params, self.spec, self.model.tokenizer)
        self._programs.wait("open_stream")
        engine.open()
        self._programs.wait(self._kind(0), "decode")
        self._programs.check_memory(self._kind(0), "decode")
        self._engine = engine

    def __iter__(self) -> Iterator[Said]:
        try:
            self.prepare()
            assert self._engine is not None
            yield from self._run(self._engine)
        finally:
            self.close()

    def close(self) -> None:
        """Ends reading and compiling."""
        getattr(self._rounds, "close", lambda: None)()
        if self._programs is not None:
            self._programs.close()

    @property
    def state_bytes(self) -> int:
        """Of the stream's state, which does not grow."""
        return tree_bytes(self._engine.state) if self._engine else 0

    def _run(self, engine: Engine) -> Iterator[Said]:
        assert self._programs is not None
        waiting: tuple[VideoRound, EngineRound] | None = None  # on the device
        ended: UserError | None = None  # why the video ended early: told after all that could be read
        item, self._first = self._first, None
        self._marks.append((time.perf_counter(), item[0].start if item else 0.0))
        while item is not None:
            video, frames = item
            kind = self._kind(video.index)
            if waiting and (self._must_know(video.index) or not self._programs.ready(kind)):
                yield self._finish(engine, *waiting)
                waiting = None
            clock = time.perf_counter()
            self._programs.wait(kind)
            self._compiling += time.perf_counter() - clock
            question = self._questions.get(video.index)
            try:
                sent = engine.step(frames, {0: (video.start, video.end)}, {0: question} if question else None)
            except UserError as error:  # a capacity is reached
                ended = error
                break
            if waiting:
                yield self._finish(engine, *waiting)
            waiting = video, sent
            if self.live:
                yield self._finish(engine, *waiting)
                waiting = None
            try:
                item = next(self._rounds, None)
            except UserError as error:
                item, ended = None, error
        if waiting:
            yield self._finish(engine, *waiting)
        if ended is not None:
            raise ended

    def _finish(self, engine: Engine, video: VideoRound, sent: EngineRound) -> Said:
        """Waits for a round, in the order they were sent."""
        tokens = sent.tokens()[0]
        engine.note({0: tokens})
        cached = int(np.asarray(sent.turn.cached)[0])
        now, position = time.perf_counter() - self._compiling, video.end if self.end is None else min(video.end, self.end)
        self._marks.append((now, position))
        then, before = self._marks[0]
        return Said(
            caption=Caption(video.start, video.end, engine.spoken(tokens)),
            tokens=tuple(tokens),
            cached=cached,
            cache_fill=cached / self.spec.cache.slots,
            speed=(position - before) / max(now - then, 1e-9),
            broken=video.broken,
        )

    def _must_know(self, index: int) -> bool:
        """Whether round `index` depends on what the rounds before it said, beyond what the device remembers."""
        s = self.spec.stream
        if s.mode == "windows":
            return index % self.spec.cache.vision_window == 0
        return s.mode in ("streaming", "recompute") and s.text_sink is None

    def _kind(self, index: int) -> Kind:
        """Which `ingest` round `index` needs."""
        opens = index % self.spec.cache.vision_window == 0 if self.spec.stream.mode == "windows" else index == 0
        return opens and bool(self.spec.stream.query)

    def _kinds(self) -> list[Kind]:
        rounds = None if self.end is None else math.ceil((self.end - self.start) / self.spec.stream.chunk_seconds)
        usual = [1] if rounds is None or rounds > 1 else []
        return list(dict.fromkeys(self._kind(index) for index in (0, *usual)))

    def _placed(self, questions: Iterable[Question], config: StreamConfig) -> dict[int, str]:
        """The text asked in each round. UserError for a question outside of what is captioned."""
        placed: dict[int, list[str]] = {}
        for when, text in questions:
            if not (math.isfinite(when) and when >= self.start and (self.end is None or when < self.end)):
                until = "" if self.end is None else f" to {self.end:g} s"
                raise UserError(f"the question {text!r} at {when:g} s is outside of what is captioned, {self.start:g} s{until}")
            placed.setdefault(math.floor((when - self.start) / config.chunk_seconds + 1e-9), []).append(text)
        return {index: " ".join(texts) for index, texts in placed.items()}

    def _read(self) -> Iterator[tuple[VideoRound, jax.Array]]:
        """The video's rounds, and their frames on the way to the device. Runs in the reading thread."""
        s, size = self.spec.stream, (self.spec.height, self.spec.width)
        for video in read_rounds(
            self.source, fps=s.fps, chunk_seconds=s.chunk_seconds, start=self.start, duration=self._duration, size=size
        ):
            yield video, jax.device_put(np.ascontiguousarray(video.frames.transpose(0, 3, 1, 2))[None], self._place)


def stream_config(settings: Mapping[str, Any]) -> StreamConfig:
    """StreamConfig of these fields. UserError, not TypeError, for a name that it does not have."""
    names = {field.name for field in dataclasses.fields(StreamConfig)}
    unknown = sorted(set(settings) - names)
    if unknown:
        raise UserError(f"there is no setting {unknown[0]!r}: the settings are {', '.join(sorted(names))}, start, duration and questions")
    return StreamConfig(**settings)
