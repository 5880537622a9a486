"""The training step of a run, compiled for chips that are not here, and what it takes of them."""

import dataclasses
import time
from typing import Any

from svlm_jax.config import ModelConfig
from svlm_jax.configs.models import MODELS
from svlm_jax.data.batch import Batch
from svlm_jax.errors import UserError
from svlm_jax.planning import compiling
from svlm_jax.planning.bounds import Bounds, step_bounds
from svlm_jax.planning.chips import Topology
from svlm_jax.planning.hlo import Collective, collectives
from svlm_jax.planning.work import Work, kept_bytes, shard_bytes, work
from svlm_jax.sharding import make_mesh, replicated_axes
from svlm_jax.training.config import RunConfig
from svlm_jax.training.hosts import loaders
from svlm_jax.training.setup import batch_shapes, make_trainer
from svlm_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step on a topology. Bytes are those of one chip."""

    topology: Topology
    trainer: Trainer
    config: RunConfig
    hosts: int
    parts: dict[str, int]  # of the arguments: trained, frozen, moments, batch
    work: Work
    notes: tuple[str, ...]  # of the attention that was chosen, and of what stays whole
    compile_seconds: float
    memory: compiling.Memory | None  # None where the compiler finds no room
    needed: int  # in all
    available: int
    sent: tuple[Collective, ...]
    compiler: dict[str, float]  # operations and bytes by the compiler's own count, in which a loop is one turn
    bounds: Bounds

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needed <= self.available


def model_of(config: RunConfig) -> ModelConfig:
    """The model of a run: that of its weights where they are here, else the one that it names. Nothing is downloaded."""
    from svlm_jax.checkpoints.hub_config import read_config
    from svlm_jax.checkpoints.load import find

    if config.weights:
        try:
            return read_config(find(config.weights)[0])
        except UserError:
            pass
    if config.model not in MODELS:
        raise UserError(f"weights {config.weights!r} are not here, and model {config.model!r} is unknown: {', '.join(MODELS)}")
    return MODELS[config.model]()


def plan_training(config: RunConfig, topology: Topology) -> Planned:
    """Compiles the step that `train.py` would run there."""
    devices = compiling.devices(topology)
    model = model_of(config)
    mesh = make_mesh(**config.mesh.sizes(len(devices)), devices=devices)
    parts = loaders(mesh)
    if config.data.lanes % len(parts):
        raise UserError(f"{config.data.lanes} lanes cannot be shared by {len(parts)} hosts: set data.lanes to a multiple of {len(parts)}")
    trainer = make_trainer(config, model, mesh, "tpu" if topology.chip.platform == "tpu" else "gpu")
    shapes = batch_shapes(config.data, model)
    notes = [f"attention: {trainer.recipe.attention.name}", *(f"not {line}" for line in trainer.recipe.attention.rejected)]
    notes += [f"stays whole: {line}" for line in replicated_axes(model, mesh)]

    sizes, todo = parts_of(trainer, shapes), work(trainer, shapes)

    start = time.perf_counter()
    memory, sent, told = None, (), {}
    try:
        program = compiling.compiled(trainer.jitted(shapes).lower(trainer.abstract_state(), trainer.placed(shapes)), topology.chip.platform)
    except compiling.DoesNotFit as error:
        needed, available = error.needed, error.available
    else:
        memory, available = compiling.memory(program), topology.chip.usable
        needed = memory.total
        sent = tuple(collectives(program.as_text(), len(devices)))
        told = cost(program)
    seconds = time.perf_counter() - start
    bounds = step_bounds(topology.chip, todo.executed, todo.moved, sum(one.moved for one in sent), todo.model.total / len(devices))
    return Planned(
        topology, trainer, config, len({d.process_index for d in devices}), sizes, todo, tuple(notes), seconds,
        memory, needed, available, sent, told, bounds,
    )  # fmt: skip


def parts_of(trainer: Trainer, shapes: Batch) -> dict[str, int]:
    """Bytes of one chip's part of each of the step's arguments."""
    state = trainer.abstract_state()
    held = {"trained": state.trained, "frozen": state.frozen, "moments": state.moments, "batch": trainer.placed(shapes)}
    return {name: shard_bytes(tree) for name, tree in held.items()}


def cost(program: Any) -> dict[str, float]:
    """Operations and bytes by the compiler's own count."""
    found = program.cost_analysis() or {}
    return {"operations": float(found.get("flops", 0)), "bytes": float(found.get("bytes accessed", 0))}


def suggestions(planned: Planned) -> list[str]:
    """What to change where it does not fit, what helps most first; or what there is room for."""
    config, trainer, mesh = planned.config, planned.trainer, planned.trainer.recipe.placement.mesh
    shapes = batch_shapes(config.data, trainer.model)
    order = ["nothing", "products", "gate_up", "full"]
    at = order.index(config.remat)
    now = kept_bytes(trainer, shapes, config.remat)
    if planned.fits:
        if at and (more := kept_bytes(trainer, shapes, order[at - 1]) - now) < 0.9 * (planned.available - planned.needed):
            return [f"there is room for remat={order[at - 1]}, which keeps {gb(more)} more and computes less again"]
        return []
    missing = planned.needed - planned.available
    ways: list[tuple[float, str]] = []
    micro = config.data.rows // config.step.accumulate // trainer.recipe.placement.row_shards
    if micro > 1:
        count = config.step.accumulate * micro
        ways.append((now * (1 - 1 / micro), f"step.accumulate={count}, one row of each chip at a time"))
    ways += [(now - kept_bytes(trainer, shapes, policy), f"remat={policy}") for policy in order[at + 1 :]]
    state = planned.parts["trained"] + planned.parts["moments"]
    if config.step.optimizer.moments == "float32":
        ways.append((planned.parts["moments"] / 2, "step.optimizer.moments=bfloat16"))
    if mesh.shape["data"] > 1:
        ways.append((state * (1 - 1 / mesh.shape["data"]), "mesh.data=1 mesh.fsdp=-1: parameters and moments cut over all chips"))
    if trainer.recipe.attention.name != "cudnn" and mesh.shape["fsdp"] > 1:
        ways.append((now / 2, f"mesh.sequence={2 * mesh.shape['sequence']}: twice as many chips for a row"))
    ways = sorted((way for way in ways if way[0] > 0.02 * planned.available), key=lambda way: way[0] < missing)
    found = [f"{what} (about {gb(saved)} less)" for saved, what in ways]
    return [*found, "shorter rows (data.shape.tokens, .bins), adapters (step.lora.rank=16), or more chips"]


def gb(size: float) -> str:
    """In units of 1e9 bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
