"""`svlm bench stream`: what a round costs in steady state, end to end and stage by stage.

The programs are the ones that serve. Frames come from a decoded H.264 file and differ from round to round. The previous text is
full from the start, and warm-up lasts until the windows are full too, so that every measured round evicts what it appends.
Without a checkpoint the weights are random, and prompts use the tiny model's tokenizer, whose ids every vocabulary has: only shapes
matter. Every turn runs to its budget, because the column of `<|im_end|>` in the head is zero: the largest of many thousand other
logits is never below it. Tokens are the likeliest ones (temperature 0).
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import itertools
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from svlm_jax import demo
from svlm_jax.bench import profile, timeline
from svlm_jax.bench.ceilings import Ceilings, measure
from svlm_jax.bench.floors import floors
from svlm_jax.bench.report import Compilations, Log, device_bytes, host_bytes, percentiles, surroundings, table, write_json
from svlm_jax.checkpoints.load import load as load_checkpoint
from svlm_jax.checkpoints.load import on_mesh
from svlm_jax.commands.device import mesh_of_flag
from svlm_jax.commands.flags import add_mesh
from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.configs.models import MODELS
from svlm_jax.data import video
from svlm_jax.errors import UserError
from svlm_jax.model.layers import Declare
from svlm_jax.model.quantized import KINDS, Quantization, quantize
from svlm_jax.model.qwen_vl import abstract_params, compute_dtype, init_params
from svlm_jax.model.text import DecoderLayer
from svlm_jax.model.vision import VisionBlock
from svlm_jax.programs import Programs
from svlm_jax.sharding import param_shardings
from svlm_jax.streaming.engine import Engine, Round, make_spec
from svlm_jax.streaming.placed import check_streams, rows_sharding
from svlm_jax.streaming.prompt import encode_words
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Array, Params, UInt8

WEIGHTS = {  # of activations and what is not quantized; how the others are
    "bf16": (jnp.bfloat16, None),
    "f32": (jnp.float32, None),
    "int8": (jnp.bfloat16, Quantization("int8")),
    "fp8": (jnp.bfloat16, Quantization("fp8")),
    "fp8_products": (jnp.bfloat16, Quantization("fp8_products")),
}
CLIP_SECONDS, CLIP_RATE = 12, 25
SETTLED = 50  # rounds until the host's memory is looked at first
PROGRESS_SECONDS = 5.0
READ_BEFORE = 4  # rounds


@dataclasses.dataclass(frozen=True)
class Load:
    """One run: what is watched, and how."""

    mode: str = "streaming"
    positions: str = "contiguous"
    fps: float = 2.0
    chunk_seconds: float = 1.0
    height: int = 560
    width: int = 1008
    rounds: int = 100
    tokens: int = 20
    streams: int = 1
    vision_window: int = 16
    text_window: int = 16
    text_sink: int = 512
    text_sliding: int = 512
    text_refresh: int = 0
    kv: str | None = None
    capacity_rounds: int = 0  # that mode "full" has room for; 0: all of them
    profile_rounds: int = 8
    keep_profile: str | None = None  # a folder
    pipelined_rounds: int = 20

    @property
    def warmup_rounds(self) -> int:
        return 4 if self.mode == "full" else max(self.vision_window, self.text_window) + 3

    def stream_config(self, tokenizer: Tokenizer) -> StreamConfig:
        total = self.warmup_rounds + self.rounds + self.pipelined_rounds + self.profile_rounds
        room = self.capacity_rounds or total
        same = ("vision_window", "text_window", "text_sink", "text_sliding", "text_refresh", "chunk_seconds", "fps", "mode", "positions", "kv")
        return StreamConfig(
            **{name: getattr(self, name) for name in same},
            max_new_tokens=self.tokens,
            temperature=0.0,
            query="",  # one program for all rounds
            question_capacity=0,
            previous_text=filler(tokenizer, self.text_sink + self.text_sliding - 1),
            capacity_rounds=max(2, room),
        )


class Model(NamedTuple):
    name: str
    weights: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


def filler(tokenizer: Tokenizer, count: int) -> str:
    """A text of `count` tokens, or a few less."""
    words = ["The ball goes left", "and the keeper waits", "while the wind turns", "so nobody runs", "before the whistle"]
    pieces: list[str] = []
    left = count
    for number in itertools.count():
        piece = f" {words[number % len(words)]} {number % 97},"
        left -= len(encode_words(tokenizer, piece))
        if left < 0:
            break
        pieces.append(piece)
    while pieces and len(encode_words(tokenizer, "".join(pieces))) > count:
        pieces.pop()
    return "".join(pieces)


def load_model(name: str, weights: str, log: Log, mesh: Mesh | None = None) -> Model:
    """Random weights of a published size, or the checkpoint in a directory; turns cannot close."""
    start, (dtype, quantization) = time.perf_counter(), WEIGHTS[weights]
    if name in MODELS:
        config, tokenizer = on_mesh(MODELS[name](), mesh), Tokenizer.load(Path(demo.__file__).with_name("tiny"))
        params = random_params(config, jax.random.key(0), dtype, mesh)
    else:
        found = load_checkpoint(name, dtype=dtype, mesh=mesh)
        config, tokenizer, params = found.config, found.tokenizer, found.params
    never_close(config, params, tokenizer.special("<|im_end|>"))
    if quantization is not None:
        params = quantize(params, quantization)
    jax.block_until_ready(params)
    size = sum(a.size for a in jax.tree.leaves(params)) / 1e6
    log(f"{name} {weights}: {size:,.2f} million parameters in {time.perf_counter() - start:.1f} s")
    return Model(name, weights, config, params, tokenizer)


def random_params(config: ModelConfig, key: Array, dtype: Any, mesh: Mesh | None = None) -> Params:
    """As `init_params`, drawn layer by layer: three small programs instead of one that is compiled for minutes."""
    places: Any = None if mesh is None else param_shardings(config, mesh)

    def maker(make, place):
        return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(make(Declare(key, dtype)))), out_shardings=place)

    rest = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=0),
        text=dataclasses.replace(config.text, num_hidden_layers=0),
    )
    block_place, layer_place, rest_place = None, None, None
    if mesh is not None:
        block_place, layer_place = places["vision"]["blocks"][0], places["text"]["layers"][0]
        rest_place = param_shardings(rest, mesh)
    params = jax.jit(lambda key: init_params(rest, key, dtype=dtype), out_shardings=rest_place)(key)
    block = maker(lambda declare: VisionBlock(config.vision, declare), block_place)
    layer = maker(lambda declare: DecoderLayer(config.text, declare), layer_place)
    params["vision"]["blocks"] = {i: block(jax.random.fold_in(key, i)) for i in range(config.vision.depth)}
    params["text"]["layers"] = {i: layer(jax.random.fold_in(key, 1000 + i)) for i in range(config.text.num_hidden_layers)}
    expected = jax.tree.map(lambda a: (a.shape, a.dtype), abstract_params(config, dtype=dtype))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == expected
    return params


def never_close(config: ModelConfig, params: Params, im_end: int) -> None:
    """Zeroes the logit of `<|im_end|>`, in place of the tree's leaf."""
    name, index = ("embedding", (im_end,)) if config.text.tie_word_embeddings else ("head", (slice(None), im_end))
    old = params["text"][name]
    params["text"][name] = jax.jit(lambda a: a.at[index].set(0), donate_argnums=0, out_shardings=old.sharding)(old)


def write_clip(path: Path, height: int, width: int, rate: int = CLIP_RATE) -> None:
    """A moving texture with moving boxes, as H.264: every frame differs from the one before."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 255, (-(-height // 16) + 24, -(-width // 16) + 24, 3), np.uint8)
    texture = cells.repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "23", "g": "50"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(CLIP_SECONDS * rate):
            turn = number / rate
            y, x = int(150 + 140 * np.sin(turn)), int(150 + 140 * np.cos(0.7 * turn))
            pixels = texture[y : y + height, x : x + width].copy()
            top, left = int((height // 2) * (1 + np.sin(2 * turn)) / 2), int((width // 2) * (1 + np.sin(3 * turn)) / 2)
            pixels[top : top + height // 4, left : left + width // 4] = (number * 3 % 256, 255 - number % 256, 40)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def endless(path: str, load: Load, offset: float) -> Iterator[video.Round]:
    """The rounds of a file over and over, from `offset` seconds on at first."""
    start = offset
    while True:
        yield from video.read_rounds(path, fps=load.fps, chunk_seconds=load.chunk_seconds, start=start, size=(load.height, load.width))
        start = 0.0


def _planar(frames: UInt8[Array, "B F height width 3"]) -> UInt8[Array, "B F 3 height width"]:
    """Frames as decoders give them, as the programs take them; on the device this costs microseconds."""
    return jnp.moveaxis(frames, -1, 2)


def planar_for(engine: Engine) -> Callable[[Any], Array]:
    """`_planar` where the engine is: on a mesh, each device gets its own streams' frames."""
    if engine.mesh is None:
        return jax.jit(_planar)
    place = rows_sharding(engine.mesh, engine.streams)
    return jax.jit(_planar, in_shardings=place, out_shardings=place)


class TimedEngine(Engine):
    """The engine that serves, which notes when a round was enqueued and when its first token reached host memory."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ingested = 0.0  # when the first program of the round was enqueued
        self._firsts: queue.SimpleQueue[Array | None] = queue.SimpleQueue()
        self._times: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="first-word", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while (first := self._firsts.get()) is not None:
            try:
                np.asarray(first)
                self._times.put(time.perf_counter())
            except Exception as error:
                self._times.put(error)

    def ingest(self, frames: Any, prompt: Any) -> Array:
        first = super().ingest(frames, prompt)
        # Enqueueing a loop can keep this thread busy until it ends, so another one waits for the token
        first.copy_to_host_async()
        self._firsts.put(first)
        self.ingested = time.perf_counter()
        return first

    def first_word(self) -> float:
        """When the first token of the oldest round not asked for yet reached the host; waits for it."""
        seen = self._times.get()
        if isinstance(seen, BaseException):
            raise seen
        return seen

    def stop(self) -> None:
        self._firsts.put(None)
        self._thread.join()


class Viewer:
    """Streams and their videos: enqueues one round after another."""

    def __init__(self, engine: TimedEngine, load: Load, path: str):
        self.engine, self.load, self.number = engine, load, 0
        self.planar = planar_for(engine)
        self.read_ms = 0.0
        self.lit = 0.0  # when the last frame of the newest round was in host memory
        seconds = video.probe(path).duration or 0.0
        span = max(0.0, seconds - load.chunk_seconds)
        self._readers: list[Any] = [video.read_ahead(endless(path, load, span * row / load.streams)) for row in range(load.streams)]

    def read(self) -> list[video.Round]:
        """The next round of every stream's video."""
        return [next(reader) for reader in self._readers]

    def enqueue(self, shown: Sequence[video.Round] | None = None) -> Round:
        shown = shown or self.read()
        self.read_ms = 1e3 * sum(one.read_seconds for one in shown) / len(shown)
        begin = self.number * self.load.chunk_seconds
        self.number += 1
        self.lit = time.perf_counter()
        frames = shown[0].frames[None] if len(shown) == 1 else np.stack([one.frames for one in shown])
        return self.engine.step(self.planar(frames), {row: (begin, begin + self.load.chunk_seconds) for row in self.engine.open_rows})

    def finish(self, round: Round) -> tuple[dict[int, list[int]], float]:
        """Tokens of a round, and when they were in host memory."""
        tokens = round.tokens()
        done = time.perf_counter()
        self.engine.note(tokens)
        return tokens, done

    def watch(self) -> dict[int, list[int]]:
        tokens, _ = self.finish(self.enqueue())
        self.engine.first_word()
        return tokens

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def program_labels(engine: Engine, viewer: Viewer) -> dict[str, dict[str, profile.Label]]:
    """Scopes of the instructions of both programs; they are compiled already, so this only prints them."""
    spec, streams = engine.spec, engine.streams
    frames = viewer.planar(np.zeros((streams, spec.stream.frames_per_round, spec.height, spec.width, 3), np.uint8))
    prompt = engine.prompt({row: (0.0, 1.0) for row in engine.open_rows})
    calls = {"ingest": (engine.params, engine.state, frames, prompt, engine._key), "decode": (engine.params, engine.state, engine._key)}
    return dict(profile.labels(engine.programs[name].lower(*args).compile().as_text() or "") for name, args in calls.items())


def run_load(model: Model, load: Load, ceilings: Ceilings, log: Log, *, path: str) -> dict[str, Any]:
    """One run, as the object that the JSON file holds."""
    with watching(model, load, path) as viewer, Compilations() as compilations:
        return _run(model, load, ceilings, log, viewer.engine, viewer, compilations)


def over_time(model: Model, load: Load, log: Log, *, path: str) -> dict[str, Any]:
    """One run from its first round on. Nothing of it is left on the device for the next one."""
    with watching(model, load, path) as viewer:
        line = timeline.watch(viewer, load.rounds, log)
        viewer.engine.state = None  # type: ignore[assignment]
    del viewer
    gc.collect()
    return timeline.record(model, load, line)


@contextlib.contextmanager
def watching(model: Model, load: Load, path: str) -> Iterator[Viewer]:
    """An engine and its videos, before the first round."""
    stream = load.stream_config(model.tokenizer)
    spec = make_spec(model.config, stream, model.tokenizer, height=load.height, width=load.width)
    with contextlib.ExitStack() as stack:
        engine = TimedEngine(model.params, spec, model.tokenizer, streams=load.streams)
        stack.callback(engine.stop)
        viewer = Viewer(engine, load, path)
        stack.callback(viewer.close)
        yield viewer


def _run(
    model: Model, load: Load, ceilings: Ceilings, log: Log, engine: TimedEngine, viewer: Viewer, compilations: Compilations
) -> dict[str, Any]:
    start = time.perf_counter()
    programs = Programs(engine.spec, model.params, compute_dtype(model.params), [False], streams=load.streams)
    programs.wait("open_stream", "decode", False)
    programs.close()
    log(f"three programs compiled after {time.perf_counter() - start:.1f} s")
    for row in range(load.streams):
        engine.open(row)
    for number in range(load.warmup_rounds):
        viewer.watch()
        if number < 2:
            log(f"warm-up round {number + 1} after {time.perf_counter() - start:.1f} s")
    labels = program_labels(engine, viewer) if load.profile_rounds else {}
    warm, device = compilations.count, device_bytes()
    log(f"warm after {load.warmup_rounds} rounds and {time.perf_counter() - start:.1f} s, {warm} programs compiled")

    count = load.rounds
    milliseconds = {name: np.zeros(count) for name in ("round", "first_word", "read_video", "host", "enqueue_decode")}
    said, cached = np.zeros(count, np.int32), np.zeros(count, np.int64)
    host, shown = host_bytes(), time.perf_counter()
    for i in range(count):
        if i == SETTLED:
            host = host_bytes()
        round = viewer.enqueue()
        enqueued = time.perf_counter()
        tokens, done = viewer.finish(round)
        marks = {
            "round": done - viewer.lit,
            "first_word": engine.first_word() - viewer.lit,
            "host": engine.ingested - viewer.lit,
            "enqueue_decode": enqueued - engine.ingested,
        }
        for name, seconds in marks.items():
            milliseconds[name][i] = 1e3 * seconds
        milliseconds["read_video"][i] = viewer.read_ms
        said[i] = min(len(ids) for ids in tokens.values())
        cached[i] = np.median(np.asarray(round.turn.cached))
        if done - shown > PROGRESS_SECONDS:
            shown = done
            recent = np.median(milliseconds["round"][max(0, i - 99) : i + 1])
            log(f"round {i + 1:,} of {count:,}: {recent:.2f} ms, host {host_bytes() / 1e6:,.0f} MB")
    del round  # its arrays are no growth
    grown = host_bytes() / host - 1 if host else 0.0
    device_growth, recompiled = device_bytes() - device, compilations.count - warm
    ahead = pipelined(viewer, load.pipelined_rounds)
    on_device, parts = profiled(viewer, load, labels, log)

    tenth = max(1, count // 10)
    took, median_cached = milliseconds.pop("round"), float(np.median(cached))
    first_word = percentiles(milliseconds.pop("first_word"))
    dtype, quantization = WEIGHTS[model.weights]
    how = {} if quantization is None else {"weight_dtype": KINDS[quantization.stored][0], "narrow": quantization.narrow_rows}
    all_devices = ceilings.times(1 if engine.mesh is None else engine.mesh.size)
    least = floors(engine.spec, all_devices, streams=load.streams, cached_tokens=median_cached, dtype=dtype, **how)
    settings = dataclasses.asdict(load)
    return {
        **surroundings(),
        "model": model.name,
        "weights": model.weights,
        "kv": load.kv or jnp.dtype(dtype).name,
        "mesh": {"data": 1, "tensor": 1} if engine.mesh is None else {axis: engine.mesh.shape[axis] for axis in ("data", "tensor")},
        **{name: settings[name] for name in ("mode", "positions", "fps", "chunk_seconds", "height", "width", "streams", "rounds")},
        **{name: settings[name] for name in ("vision_window", "text_window", "text_sink", "text_sliding", "text_refresh")},
        "tokens_per_round": float(np.median(said)),
        "turns_at_budget": float(np.mean(said == load.tokens)),
        "cached_tokens": median_cached,
        "round_ms": percentiles(took),
        "pipelined_round_ms": ahead,
        "stages_ms": {name: percentiles(values) for name, values in milliseconds.items()} | on_device,
        "parts_ms": parts,
        "first_word_ms": first_word,
        "compilations_after_warmup": recompiled,
        "device_memory_growth_bytes": device_growth,
        "host_memory_growth": round_to(grown, 5),
        "late_over_early": round_to(float(np.median(took[-tenth:]) / np.median(took[:tenth])), 4),
        "ceilings": {name: round_to(value, 4) for name, value in dataclasses.asdict(ceilings).items() if value is not None},
        "floor_ms": {name: round_to(value, 6) for name, value in least.items()},
    }


def round_to(value: float, digits: int) -> float:
    return float(f"{value:.{digits}f}") if abs(value) >= 10.0**-digits else float(f"{value:.3g}")


def pipelined(viewer: Viewer, count: int) -> float | None:
    """Milliseconds a round where the next one is enqueued before the last one is waited for; None for no rounds."""
    if count < 2:
        return None
    flying: collections.deque[Round] = collections.deque()
    shown = [viewer.read() for _ in range(READ_BEFORE)]  # so that decoding the video does not set the pace
    start = time.perf_counter()
    for number in range(count):
        flying.append(viewer.enqueue(shown[number % READ_BEFORE]))
        if len(flying) > 1:
            viewer.finish(flying.popleft())
    while flying:
        viewer.finish(flying.popleft())
    seconds = time.perf_counter() - start
    for _ in range(count):
        viewer.engine.first_word()
    return round_to(1e3 * seconds / count, 4)


def profiled(
    viewer: Viewer, load: Load, programs: dict[str, dict[str, profile.Label]], log: Log
) -> tuple[dict[str, dict[str, float] | None], dict[str, float]]:
    """Stages of the device, percentiles in milliseconds (None where no profile could be had), and medians of their parts."""
    names = ("vision", "prefill", "decode_step", "evict", "other", "decode", "device_round", "device_gaps")
    seen: Sequence[profile.Round] = ()
    if load.profile_rounds:
        events: list[profile.Event] = []
        try:
            with profile.recording(load.keep_profile) as events:
                for _ in range(load.profile_rounds):
                    viewer.watch()
        except Exception as error:  # a machine may forbid profiling; what was measured so far is worth keeping
            log(f"no profile: {type(error).__name__}: {error}")
        seen = profile.rounds(events, programs)
        log(f"profiled {len(seen)} of {load.profile_rounds} rounds, {len(events)} kernels")
    if not seen:
        return dict.fromkeys(names), {}
    steps = max(1, load.tokens - 1)
    stages = {name: [one.stages[name] for one in seen] for name in ("vision", "prefill", "evict", "other", "decode")}
    stages["decode_step"] = [value / steps for value in stages["decode"]]
    stages["device_round"] = [one.total for one in seen]
    stages["device_gaps"] = [one.gaps for one in seen]
    parts: dict[str, float] = {}
    for name in sorted({name for one in seen for name in one.parts}):
        stage, _, part = name.partition("/")
        value = float(np.median([one.parts.get(name, 0.0) for one in seen]))
        parts[f"decode_step/{part}" if stage == "decode" else name] = round_to(value / steps if stage == "decode" else value, 5)
    return {name: percentiles(stages[name]) for name in names}, parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that take several values make a run for every combination."""
    default = Load()
    parser.add_argument("--model", default="tiny", metavar="{tiny,3b,7b,DIR}", help="random weights of a size, or a checkpoint's directory")
    parser.add_argument("--weights", default="bf16", choices=list(WEIGHTS))
    add_mesh(parser)
    modes = f"(default: {default.mode}; with --plot all of them)"
    parser.add_argument("--mode", nargs="+", choices=timeline.MODES, metavar="MODE", help=f"{', '.join(timeline.MODES)} {modes}")
    parser.add_argument("--positions", nargs="+", default=[default.positions], choices=["contiguous", "append"])
    parser.add_argument("--fps", nargs="+", type=float, default=[default.fps], help="frames a second that the model sees")
    parser.add_argument("--streams", nargs="+", type=int, default=[default.streams], help="streams in one batch")
    parser.add_argument("--height", type=int, default=default.height, help="pixels of a frame, a multiple of 28")
    parser.add_argument("--width", type=int, default=default.width)
    parser.add_argument("--chunk", dest="chunk_seconds", type=float, default=default.chunk_seconds, help="seconds of video a round")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="measured rounds, after warm-up")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="tokens said in every round")
    parser.add_argument("--vision-window", type=int, default=default.vision_window, help="rounds")
    parser.add_argument("--text-window", type=int, default=default.text_window, help="rounds")
    parser.add_argument("--text-sink", type=int, default=default.text_sink, help="tokens")
    parser.add_argument("--text-sliding", type=int, default=default.text_sliding, help="tokens")
    parser.add_argument("--text-refresh", type=int, default=default.text_refresh, help="rounds; 0: never")
    parser.add_argument("--kv", choices=["int8"], help="keep keys and values in 8 bits (default: in the type of the computation)")
    parser.add_argument("--profile-rounds", type=int, default=default.profile_rounds, help="rounds under the device profiler; 0: no stages")
    parser.add_argument("--keep-profile", metavar="DIR", help="keep the profiler's files, for XProf or Perfetto")
    parser.add_argument("--pipelined-rounds", type=int, default=default.pipelined_rounds, help="rounds enqueued ahead; 0: none")
    parser.add_argument("--video", metavar="FILE", help="watch this file over and over instead of a drawn clip")
    plot = (
        "draw a token's and a round's time and memory over stream time instead, a line a mode, from the first round on (needs matplotlib)"
    )
    parser.add_argument("--plot", metavar="FILE", help=plot)
    parser.add_argument("--record", metavar="JSON", help="with --plot: draw what an earlier run wrote with --json, and measure nothing")
    parser.add_argument("--json", metavar="FILE", help="write the results: an object, or a list of several")


def _loads(args: argparse.Namespace) -> Iterator[Load]:
    several = {
        "mode": args.mode or (timeline.MODES if args.plot else [Load.mode]),
        **{name: getattr(args, name) for name in ("positions", "fps", "streams")},
    }
    fixed = {f.name: getattr(args, f.name) for f in dataclasses.fields(Load) if f.name not in (*several, "capacity_rounds")}
    for values in itertools.product(*several.values()):
        load = Load(**fixed, **dict(zip(several, values, strict=True)))
        yield dataclasses.replace(load, capacity_rounds=min(timeline.FIRST_CAPACITY, load.rounds)) if args.plot else load


def run(args: argparse.Namespace) -> int:
    """Every combination of the flags: the results into the JSON file as they come, the tables to the standard output at the end."""
    if args.record:
        return _draw_again(args)
    loads = list(_loads(args))
    for load in loads:
        for name, least in (("rounds", 1), ("tokens", 1), ("streams", 1), ("profile_rounds", 0), ("pipelined_rounds", 0)):
            if getattr(load, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(load, name)}")

    start = time.perf_counter()

    def log(message: str) -> None:
        print(f"[{time.perf_counter() - start:7.1f} s] {message}", file=sys.stderr, flush=True)

    if args.plot and not args.json:
        timeline.check_drawing()
    mesh = mesh_of_flag(args.mesh)
    for load in loads:
        check_streams(mesh, load.streams)
    eight = WEIGHTS[args.weights][1]
    ceilings = None if args.plot else measure(fp8=eight is not None and eight.narrow_rows)
    if ceilings:
        log(f"ceilings: copy {ceilings.copy_tbps:.3g} TB/s, matrix product {ceilings.matmul_tflops:.4g} TFLOP/s")
    model = load_model(args.model, args.weights, log, mesh)
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        path = args.video
        if path is None:
            path = str(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svlm-bench-"))) / "clip.mp4")
            write_clip(Path(path), args.height, args.width, max(CLIP_RATE, round(max(args.fps))))
        for load in loads:
            if len(loads) > 1:
                log(f"run {len(results) + 1} of {len(loads)}: {load.mode}, {load.positions}, {load.fps:g} fps, {load.streams} streams")
            results.append(run_load(model, load, ceilings, log, path=path) if ceilings else over_time(model, load, log, path=path))
            if args.json:
                write_json(args.json, results)
    if args.plot:
        try:
            timeline.plot(results, Path(args.plot))
        except UserError as error:
            if not args.json:
                raise
            log(f"no picture, but {args.json} has what it shows: {error}")
        print(timeline.table(results))
    else:
        print("\n\n".join(table(result) for result in results))
    return 0


def _draw_again(args: argparse.Namespace) -> int:
    """The picture of an earlier record."""
    if not args.plot:
        raise UserError("--record needs --plot, the picture that is drawn of it")
    records = timeline.read(Path(args.record))
    timeline.plot(records, Path(args.plot))
    print(timeline.table(records))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m svlm_jax.bench.stream", description="What a round costs, stage by stage.")
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
