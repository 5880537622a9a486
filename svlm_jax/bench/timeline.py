"""`svlm bench stream --plot`: latency and memory against stream time, from a stream's first round on, in each of the modes.

The paper's Figure 7 (arXiv 2510.09608). Mode "full" forgets nothing: its cache begins small and grows whenever it is full, as far as
memory goes, and the run ends there; programs for a larger cache are compiled between rounds, and only their first call shows. The other
modes take what they take from the first round on.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from svlm_jax.bench.report import Log, device_bytes, surroundings
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import compute_dtype
from svlm_jax.programs import Programs, free_memory
from svlm_jax.streaming.engine import Engine
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.rows import SLOT_AXES
from svlm_jax.streaming.state import slot_bytes

MODES = ("full", "windows", "recompute", "streaming")
FIRST_CAPACITY = 32  # rounds that a cache which forgets nothing has room for at first
GROWTH = 2
SPARE_BYTES = 2 << 30  # of an accelerator, that a cache which grows leaves to the programs
COLUMNS = ("seconds", "round_ms", "token_ms", "memory_bytes")


@dataclasses.dataclass
class Timeline:
    """What every round took, from the first one on."""

    seconds: list[float] = dataclasses.field(default_factory=list)  # of the stream, at the round's end
    round_ms: list[float] = dataclasses.field(default_factory=list)  # from its last frame to its last token
    token_ms: list[float] = dataclasses.field(default_factory=list)  # of each token after its first
    memory_bytes: list[int] = dataclasses.field(default_factory=list)  # in use on the device after it
    out_of_memory: bool = False  # why the run ended, if not by its number of rounds

    def note(self, seconds: float, round_ms: float, token_ms: float, memory: int) -> None:
        for column, value in zip(COLUMNS, (seconds, round_ms, token_ms, memory), strict=True):
            getattr(self, column).append(value)


def grow(engine: Engine, capacity: int) -> None:
    """Gives an engine of mode "full" room for `capacity` rounds, a buffer at a time. Rooms are the last of its slots, so new ones follow."""
    spec = with_capacity(engine.spec, capacity)
    more = spec.cache.slots - engine.spec.cache.slots
    held: dict[str, Any] = {name: getattr(engine.state, name) for name in SLOT_AXES}
    rest = engine.state.replace(**dict.fromkeys(held), spec=spec)
    engine.state, engine.spec = rest, spec
    for name, axis in SLOT_AXES.items():
        leaves, tree = jax.tree.flatten(held.pop(name))
        for index, leaf in enumerate(leaves):
            pads = [(0, more if each == axis else 0) for each in range(leaf.ndim)]
            leaves[index] = jax.block_until_ready(jnp.pad(leaf, pads))
            del leaf  # the last reference to the smaller one
        held[name] = jax.tree.unflatten(tree, leaves)
    engine.state = rest.replace(**held)


def with_capacity(spec: StreamSpec, rounds: int) -> StreamSpec:
    return dataclasses.replace(spec, stream=dataclasses.replace(spec.stream, capacity_rounds=rounds))


def next_capacity(spec: StreamSpec, dtype: Any, streams: int) -> int:
    """Rounds of the next larger cache: twice as many, or as many as memory has room for; not more than now where it has none."""
    now = spec.stream.capacity_rounds
    free = free_memory()
    if free is None:
        return GROWTH * now
    spare = 0 if jax.default_backend() == "cpu" else SPARE_BYTES
    fits = int((free - spare) // (streams * spec.cache.rounds.stride * slot_bytes(spec, dtype)))
    return min(GROWTH * now, now + max(0, fits))


def watch(viewer: Any, rounds: int, log: Log) -> Timeline:
    """Runs a stream from its beginning, `rounds` rounds or until memory is full. `viewer` is one of `bench.stream`."""
    engine, load, line = viewer.engine, viewer.load, Timeline()
    dtype = compute_dtype(engine.params)

    def compile_for(spec: StreamSpec) -> None:
        programs = Programs(spec, engine.params, dtype, [False], streams=load.streams)
        programs.wait("open_stream", "decode", False)
        programs.close()

    try:
        compile_for(engine.spec)
        for row in range(load.streams):
            engine.open(row)
        for number in range(rounds):
            capacity = engine.spec.stream.capacity_rounds
            if load.mode == "full" and number == capacity:
                larger = next_capacity(engine.spec, dtype, load.streams)
                if larger <= capacity:
                    line.out_of_memory = True
                    break
                log(f"full: {capacity:,} rounds fill the cache; room for {larger:,}")
                compile_for(with_capacity(engine.spec, larger))
                grow(engine, larger)
            _, done = viewer.finish(viewer.enqueue())
            token = (done - engine.first_word()) / max(1, load.tokens - 1)
            line.note((number + 1) * load.chunk_seconds, 1e3 * (done - viewer.lit), 1e3 * token, device_bytes(collect=False))
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line.out_of_memory = True
    end = f"out of memory after {len(line.seconds):,} rounds" if line.out_of_memory else f"{rounds:,} rounds"
    log(f"{load.mode}: {end}")
    return line


def record(model: Any, load: Any, line: Timeline) -> dict[str, Any]:
    """A run, as the object that the JSON file holds."""
    same = ("mode", "positions", "fps", "chunk_seconds", "height", "width", "streams", "tokens", "vision_window", "text_window", "kv")
    return {
        **surroundings(),
        "command": ["svlm", *sys.argv[1:]],
        "model": model.name,
        "weights": model.weights,
        **{name: getattr(load, name) for name in same},
        "timeline": dataclasses.asdict(line),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """What an earlier run wrote. UserError for a file that has no timelines."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        records = found if isinstance(found, list) else [found]
        for run in records:
            Timeline(**run["timeline"])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has no timelines: `svlm bench stream --plot FILE --json FILE` writes them") from None
    return records


def check_drawing() -> None:
    """UserError, before anything is measured, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install matplotlib, or draw the --json of a run on another machine with --record")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Three panels over stream time: a token, a round, and memory; a line a run, with a cross where memory was full.

    Raises UserError where matplotlib is not installed, or the picture cannot be written.
    """
    check_drawing()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    panels = {"token_ms": ("ms a further token", 1.0), "round_ms": ("ms a round", 1.0), "memory_bytes": ("GB in use on the device", 1e9)}
    for axis, (column, (label, unit)) in zip(axes, panels.items(), strict=True):
        for run in records:
            line = run["timeline"]
            points = [value / unit for value in line[column]]
            (drawn,) = axis.plot(line["seconds"], points, label=run["mode"], linewidth=1)
            if line["out_of_memory"] and points:
                axis.plot(line["seconds"][-1:], points[-1:], marker="x", markersize=9, markeredgewidth=2, color=drawn.get_color())
        axis.set(xlabel="seconds of the stream", ylabel=label)
        axis.set_ylim(bottom=0)
    if any(run["timeline"]["out_of_memory"] for run in records):
        axes[0].plot([], [], "kx", label="out of memory")
    axes[0].legend()
    one = records[0]
    figure.suptitle(f"{one['model']} {one['weights']}, {one['width']}x{one['height']} at {one['fps']:g} fps, on {one['device']}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({error}): name a .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)


def table(records: Sequence[dict[str, Any]]) -> str:
    """A line a run: medians of its first and its last tenth."""
    lines = [f"{'mode':<12}{'seconds':>9}{'token ms':>20}{'round ms':>24}{'GB':>20}"]
    for run in records:
        line = run["timeline"]
        tenth, end = max(1, len(line["seconds"]) // 10), "  out of memory" if line["out_of_memory"] else ""
        if not line["seconds"]:
            lines.append(f"{run['mode']:<12}{end}")
            continue

        def course(column: str, unit: float = 1.0, line=line, tenth=tenth) -> str:
            return " -> ".join(f"{statistics.median(part) / unit:,.2f}" for part in (line[column][:tenth], line[column][-tenth:]))

        columns = f"{course('token_ms'):>20}{course('round_ms'):>24}{course('memory_bytes', 1e9):>20}"
        lines.append(f"{run['mode']:<12}{line['seconds'][-1]:>9,.0f}{columns}{end}")
    return "\n".join(lines)
