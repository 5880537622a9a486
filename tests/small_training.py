"""A small trainer over synthetic packed rows, for tests of the step and the loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import packed
from jax.sharding import Mesh

from svlm_jax.config import ModelConfig
from svlm_jax.configs.models import tiny
from svlm_jax.data.batch import Batch
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.sharding import make_mesh
from svlm_jax.training.attention import Job, choose
from svlm_jax.training.forward import Recipe
from svlm_jax.training.optimizer import OptimizerConfig
from svlm_jax.training.placement import Placement
from svlm_jax.training.step import StepConfig, Trainer, TrainState
from svlm_jax.types import Params

TOKENS = 48


def model() -> ModelConfig:
    """Two decoder layers; a block over windows and one over whole grids."""
    config = tiny(256)
    vision = dataclasses.replace(config.vision, depth=2, fullatt_block_indexes=(1,))
    return dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, num_hidden_layers=2))


def config(**changes) -> StepConfig:
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup=0.0, weight_decay=0.1)
    return dataclasses.replace(StepConfig(dtype="float32", loss_chunk=8, optimizer=optimizer), **changes)


def trainer(step: StepConfig, *, mesh: Mesh | None = None, remat: str = "gate_up", steps: int = 100) -> Trainer:
    mesh = mesh or make_mesh()
    attention = choose("xla", Job(model(), mesh, "cpu", TOKENS, 4, jnp.float32))
    return Trainer(model(), step, Recipe(attention, Placement(mesh), 1, remat, "full"), steps)


def params(seed: int = 0) -> Params:
    """Random parameters, drawn by NumPy, as compiling JAX's draws takes longer than all else."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), abstract_params(model(), stacked=True))


def start(trainer: Trainer, seed: int = 0) -> TrainState:
    return jax.jit(trainer.init, out_shardings=trainer.shardings())(params(seed), jax.random.key(1))


@functools.cache
def batch(rows: int = 4, seed: int = 0) -> Batch:
    """Rows of two or three chunks, of unlike numbers of labels."""

    def row(i: int) -> list[packed.Chunk]:
        seeds = (seed * 1000 + i * 10 + n for n in range(3))
        chunks = [packed.chunk(4 + i, (2, 56, 84), 5, seed=next(seeds)), packed.chunk(3, (1, 28, 28), 2 + 3 * (i % 2), seed=next(seeds))]
        return [*chunks, packed.chunk(6, seed=next(seeds))] if i % 2 else chunks

    return packed.pack(model(), [row(i) for i in range(rows)], tokens=TOKENS, bins=2, windows=2)
