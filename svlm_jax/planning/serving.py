"""The programs of a stream, compiled for chips that are not here, and what they take of them."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from svlm_jax.bench.ceilings import Ceilings
from svlm_jax.bench.floors import floors
from svlm_jax.checkpoints.load import on_mesh
from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.model.quantized import Quantization, quantized_shapes, quantized_shardings
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.planning import compiling
from svlm_jax.planning.chips import Topology
from svlm_jax.planning.hlo import Collective, collectives
from svlm_jax.planning.report import sent_lines, surroundings, verdict
from svlm_jax.planning.training import cost, gb
from svlm_jax.sharding import MESH_AXES, make_mesh, param_shardings, state_shardings
from svlm_jax.streaming.engine import make_spec
from svlm_jax.streaming.evict import evict
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.state import StreamState, prompt_shapes, state_shapes
from svlm_jax.streaming.step import decode, ingest, open_stream
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.training.config import MeshConfig

PROGRAMS: dict[str, Callable] = {"evict": evict, "open_stream": open_stream, "decode": decode, "ingest": ingest}
ORDER = ("open_stream", "ingest", "decode", "evict")  # as a stream runs them; `ingest` has an `evict` within


def stream_spec(model: ModelConfig, config: StreamConfig, *, height: int = 560, width: int = 1008) -> StreamSpec:
    """A model's engine at 720p as it is resized. The tiny model's tokenizer lays out the prompt: its ids are in every vocabulary."""
    return make_spec(model, config, Tokenizer.load(tiny_path()), height=height, width=width)


def arguments(spec: StreamSpec, dtype: Any, *, streams: int = 1, quantization: Quantization | None = None) -> dict[str, tuple[Any, ...]]:
    """Shapes of each program's arguments; the donated state is first in `evict` and second elsewhere."""

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    params, state = quantized_shapes(abstract_params(spec.model, dtype=dtype), quantization), state_shapes(spec, streams, dtype)
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), streams))
    frames = shape(streams, spec.stream.frames_per_round, 3, spec.height, spec.width, dtype=jnp.uint8)
    prompt = prompt_shapes(spec, streams)
    return {
        "evict": (state,),
        "open_stream": (params, state, shape(), shape(spec.cache.words_capacity), shape()),
        "decode": (params, state, key),
        "ingest": (params, state, frames, prompt, key),
    }


def place(spec: StreamSpec, mesh: Mesh, argument: Any, quantization: Quantization | None = None) -> Any:
    """An argument's shapes with their shardings: parameters and state by the table, all else on every device."""
    if isinstance(argument, StreamState):
        shardings = state_shardings(argument, mesh)
    elif isinstance(argument, dict):
        shardings = quantized_shardings(param_shardings(spec.model, mesh), quantization)
    else:
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), argument)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), argument, shardings)


def lower_program(
    spec: StreamSpec, name: str, mesh: Mesh, dtype: Any = jnp.bfloat16, *, streams: int = 1, quantization: Quantization | None = None
) -> jax.stages.Lowered:
    """One program, with the state donated, for the devices of a mesh."""
    shapes = arguments(spec, dtype, streams=streams, quantization=quantization)[name]
    args = tuple(place(spec, mesh, argument, quantization) for argument in shapes)
    state = next(i for i, argument in enumerate(args) if isinstance(argument, StreamState))
    return jax.jit(PROGRAMS[name], donate_argnums=state).lower(*args)


@dataclasses.dataclass(frozen=True)
class Program:
    """One program. Bytes are those of one chip."""

    name: str
    memory: compiling.Memory | None  # None where the compiler finds no room
    needed: int
    available: int
    sent: tuple[Collective, ...]
    compiler: dict[str, float]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Served:
    """A stream's programs on a topology, and the least milliseconds of its stages (`bench.floors`) at the maker's rates."""

    topology: Topology
    mesh: Mesh
    spec: StreamSpec
    streams: int
    cached_tokens: int
    programs: tuple[Program, ...]
    floor_ms: dict[str, float]

    @property
    def fits(self) -> bool:
        return all(each.memory is not None and each.needed <= each.available for each in self.programs)


def plan_serving(model: ModelConfig, topology: Topology, axes: MeshConfig, *, streams: int, config: StreamConfig | None = None) -> Served:
    """Compiles all of a stream's programs in bfloat16, of 720p video; at the defaults if there is no `config`."""
    devices = compiling.devices(topology)
    mesh = make_mesh(**axes.sizes(len(devices)), devices=devices)
    spec = stream_spec(on_mesh(model, mesh), config or StreamConfig())
    chips = mesh.size
    rates = Ceilings(topology.chip.memory_rate * chips / 1e12, topology.chip.operations * chips / 1e12)
    cached = spec.cache.slots
    least = floors(spec, rates, streams=streams, cached_tokens=cached, dtype=jnp.bfloat16)
    return Served(topology, mesh, spec, streams, cached, tuple(_plan(spec, name, mesh, topology, streams) for name in ORDER), least)


def _plan(spec: StreamSpec, name: str, mesh: Mesh, topology: Topology, streams: int) -> Program:
    start = time.perf_counter()
    try:
        program = compiling.compiled(lower_program(spec, name, mesh, streams=streams), topology.chip.platform)
    except compiling.DoesNotFit as error:
        return Program(name, None, error.needed, error.available, (), {}, time.perf_counter() - start)
    memory, seconds = compiling.memory(program), time.perf_counter() - start
    sent = tuple(collectives(program.as_text(), mesh.size))
    return Program(name, memory, memory.total, topology.chip.usable, sent, cost(program), seconds)


def table(served: Served) -> str:
    """The plan of a stream's programs."""
    s = served.spec
    axes = " ".join(f"{axis} {served.mesh.shape[axis]}" for axis in MESH_AXES if served.mesh.shape[axis] > 1) or "one chip"
    lines = [
        f"{s.model.name} on {served.topology}: {axes}, bfloat16{', keys and values in ' + s.stream.kv if s.stream.kv else ''}",
        f"  {served.streams} stream{'s' * (served.streams > 1)} of {s.width}x{s.height} at {s.stream.fps:g} fps, {s.cache.slots:,} slots each",
    ]
    for each in served.programs:
        lines += ["", f"  {each.name}"]
        if each.memory:
            m = each.memory
            lines += [
                f"  {'parameters, cache, frames':<28}{gb(m.arguments):>12}",
                f"  {'temporaries':<28}{gb(m.temporaries + m.results):>12}",
                f"  {'program':<28}{gb(m.code):>12}",
            ]
        lines.append(verdict(each.memory is not None and each.needed <= each.available, each.needed, each.available))
        lines += sent_lines(each.sent) if each.memory else []
    if not served.fits:
        lines.append("  change: more chips along --mesh tensor=-1, fewer --streams, --kv int8, or weights of 8 bits")
    lines += ["", f"  least milliseconds, all slots filled, at the rates of {served.topology.chip.source}"]
    lines += [f"  {name:<28}{value:>9.2f}" for name, value in served.floor_ms.items()]
    return "\n".join(lines)


def as_object(served: Served, command: str) -> dict[str, Any]:
    """All that was found; bytes of one chip."""
    return {
        **surroundings(served.topology),
        "command": command,
        "model": served.spec.model.name,
        "mesh": {axis: served.mesh.shape[axis] for axis in MESH_AXES},
        "streams": served.streams,
        "slots": served.cached_tokens,
        "fits": served.fits,
        "programs": [dataclasses.asdict(each) for each in served.programs],
        "floor_ms": served.floor_ms,
    }
