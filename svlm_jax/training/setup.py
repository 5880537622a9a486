"""From a run's settings to its trainer: what `train.py` and `svlm plan` share."""

import jax
from jax.sharding import AbstractMesh, Mesh

from svlm_jax.config import ModelConfig
from svlm_jax.data.batch import Batch
from svlm_jax.data.packing import make_batch
from svlm_jax.data.pipeline import DataConfig
from svlm_jax.data.samples import temporal_step
from svlm_jax.training.attention import Job, choose
from svlm_jax.training.config import RunConfig
from svlm_jax.training.forward import Recipe
from svlm_jax.training.placement import Placement
from svlm_jax.training.step import Trainer


def make_trainer(config: RunConfig, model: ModelConfig, mesh: Mesh | AbstractMesh, platform: str) -> Trainer:
    """The trainer of a run on this mesh, of devices of `platform` ("cpu", "gpu" or "tpu")."""
    shape = config.data.shape
    job = Job(model, mesh, platform, shape.tokens, shape.samples, config.step.dtype, shape.reach, shape.memory)
    unit = temporal_step(model.vision, config.data.loader.sample.fps).denominator
    recipe = Recipe(choose(config.attention, job), Placement(mesh), unit, config.remat, config.vision_remat)
    return Trainer(model, config.step, recipe, config.steps)


def batch_shapes(data: DataConfig, model: ModelConfig) -> Batch:
    """The shapes of a whole batch, over all hosts: those of `packing.make_batch`."""
    empty = make_batch([], data.shape, model.vision, evicts=data.evicts)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((data.rows, *a.shape[1:]), a.dtype), empty)
