"""A plan for people, and as an object."""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import platform
from typing import Any

from svlm_jax.bench.report import commit
from svlm_jax.bench.report import surroundings as measured_with
from svlm_jax.planning import compiling
from svlm_jax.planning.chips import Topology
from svlm_jax.planning.hlo import Collective, collectives
from svlm_jax.planning.training import Planned, cost, gb, parts_of, suggestions
from svlm_jax.planning.work import work
from svlm_jax.sharding import MESH_AXES
from svlm_jax.training.config import RunConfig
from svlm_jax.training.setup import batch_shapes
from svlm_jax.training.step import Trainer

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax")
PARTS = {"trained": "parameters, trained", "frozen": "parameters, frozen", "moments": "optimizer", "batch": "batch"}


def surroundings(topology: Topology) -> dict[str, Any]:
    """When, with what and for what: the fields that stand first in every object."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions,
        "topology": topology.name,
        "chips": topology.count,
        "chip": dataclasses.asdict(topology.chip),
    }


def as_object(planned: Planned, command: str) -> dict[str, Any]:
    """All that was found; bytes and seconds of one chip, operations of all."""
    return {
        **surroundings(planned.topology),
        "command": command,
        "hosts": planned.hosts,
        **_settings(planned.config, planned.trainer),
        "notes": planned.notes,
        "fits": planned.fits,
        "bytes": {
            **planned.parts,
            "temporaries": planned.memory and planned.memory.temporaries,
            "code": planned.memory and planned.memory.code,
            "needed": planned.needed,
            "available": planned.available,
        },
        "collectives": [dataclasses.asdict(one) for one in planned.sent],
        "operations": dataclasses.asdict(planned.work.model),
        "executed_operations_per_chip": planned.work.executed,
        "moved_bytes_per_chip": planned.work.moved,
        "compiler": planned.compiler,
        "bounds_seconds": dataclasses.asdict(planned.bounds) | {"by": planned.bounds.by} if planned.memory else None,
        "suggestions": suggestions(planned),
        "compile_seconds": round(planned.compile_seconds, 1),
    }


def of_run(program: Any, config: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """What the step of a run takes of the devices that are here, as `as_object` has it: `program` is what was compiled for them."""
    shapes, mesh = batch_shapes(config.data, trainer.model), trainer.recipe.placement.mesh
    todo, memory = work(trainer, shapes), compiling.memory(program)
    return {
        **measured_with(),
        "devices": mesh.size,
        **_settings(config, trainer),
        "attention": trainer.recipe.attention.name,
        "bytes": {**parts_of(trainer, shapes), "temporaries": memory.temporaries, "code": memory.code, "needed": memory.total},
        "collectives": [dataclasses.asdict(one) for one in collectives(program.as_text(), mesh.size)],
        "operations": dataclasses.asdict(todo.model),
        "executed_operations_per_chip": todo.executed,
        "moved_bytes_per_chip": todo.moved,
        "compiler": cost(program),
    }


def _settings(config: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """The settings that decide what a step takes."""
    mesh = trainer.recipe.placement.mesh
    return {
        "model": trainer.model.name,
        "mesh": {axis: mesh.shape[axis] for axis in MESH_AXES},
        "steps": config.steps,
        "rows": config.data.rows,
        "tokens_per_row": config.data.shape.tokens,
        "accumulate": config.step.accumulate,
        "remat": config.remat,
        "moments": config.step.optimizer.moments,
    }


def table(planned: Planned, name: str) -> str:
    """The plan of a training step."""
    config, mesh, chip = planned.config, planned.trainer.recipe.placement.mesh, planned.topology.chip
    axes = " ".join(f"{axis} {mesh.shape[axis]}" for axis in MESH_AXES if mesh.shape[axis] > 1) or "one chip"
    lines = [
        f"{name} on {planned.topology}, {planned.hosts} host{'s' * (planned.hosts > 1)}: {axes}",
        f"  {planned.trainer.model.name}, {config.data.rows:,} rows of {config.data.shape.tokens:,} tokens a step, "
        f"accumulate {config.step.accumulate}, remat {config.remat}, moments {config.step.optimizer.moments}",
        *(f"  {note}" for note in planned.notes),
        "",
        "  bytes of one chip",
        *(f"  {title:<28}{gb(planned.parts[part]):>12}" for part, title in PARTS.items()),
    ]
    if planned.memory:
        lines += [
            f"  {'activations, temporaries':<28}{gb(planned.memory.temporaries + planned.memory.results):>12}",
            f"  {'program':<28}{gb(planned.memory.code):>12}",
        ]
    lines.append(verdict(planned.fits, planned.needed, planned.available))
    lines += [f"  {'change' if not planned.fits else 'note'}: {line}" for line in suggestions(planned)]
    if planned.memory:
        lines += ["", *sent_lines(planned.sent), *_operations(planned), "", *_bounds(planned), *_run(planned), f"  rates: {chip.source}"]
    return "\n".join(lines)


def _run(planned: Planned) -> list[str]:
    """All steps of the run, were each as short as it can be."""
    steps = planned.config.steps
    hours = steps * planned.bounds.seconds / 3600
    return [f"  {f'{steps:,} steps, at least':<28}{hours:>10,.1f} h   {hours * planned.topology.count / 24:,.1f} chip-days"]


def verdict(fits: bool, needed: int, available: int) -> str:
    """Whether it fits."""
    if fits:
        return f"  {'fits: in all':<28}{gb(needed):>12} of {gb(available)}"
    return f"  does not fit: needs {gb(needed)} of {gb(available)}"


def sent_lines(sent: tuple[Collective, ...]) -> list[str]:
    """Collectives, a line each."""
    lines = ["  sent by one chip to others"]
    lines += [f"  {one.kind:<28}{gb(one.moved):>12}  in {one.count:,} operations" for one in sent]
    return lines if sent else ["  nothing is sent between chips"]


def _operations(planned: Planned) -> list[str]:
    done, chips = planned.work.model, planned.topology.count
    parts = ", ".join(f"{name} {part / chips / 1e12:,.1f}" for name, part in dataclasses.asdict(done).items() if part)
    told = planned.compiler
    return [
        "",
        f"  operations of one chip, in units of 1e12: {done.total / chips / 1e12:,.1f} ({parts}), with what is computed again "
        f"{planned.work.executed / 1e12:,.1f}",
        f"  bytes that its memory moves, at least: {gb(planned.work.moved)}",
        f"  by the compiler, each loop's body once: {told['operations'] / 1e12:,.1f}, {gb(told['bytes'])}"
        if told["operations"]
        else "  the compiler keeps no count of its own",
    ]


def _bounds(planned: Planned) -> list[str]:
    b, chip = planned.bounds, planned.topology.chip
    rates = {
        "compute": f"{chip.operations / 1e12:,.0f}e12 operations a second",
        "memory": f"{chip.memory_rate / 1e9:,.0f} GB/s of memory",
        "links": f"{chip.link_rate / 1e9:,.0f} GB/s to other chips",
    }
    lines = ["  a step takes at least"]
    for name, rate in rates.items():
        lines.append(f"  {name:<28}{getattr(b, name):>10.3f} s  at {rate}{'  (this binds)' if name == b.by else ''}")
    tokens = planned.config.data.rows * planned.config.data.shape.tokens / b.seconds
    return [*lines, f"  {'MFU at that':<28}{100 * b.mfu:>9.1f}%   {tokens:,.0f} tokens a second"]
