"""What a training step has to do on each chip, counted by hand: operations, and bytes of memory. Lower bounds both."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from svlm_jax.bench.floors import layer_parameters
from svlm_jax.data.batch import IGNORED, Batch
from svlm_jax.data.eviction import Eviction
from svlm_jax.training.flops import Operations, operations
from svlm_jax.training.step import Trainer

LABELS = 64  # one token in so many has a label, as in commentary on 24 seconds of 720p video

# Parts of a decoder layer's forward pass that its policy computes again: (products, attention)
AGAIN = {"nothing": (0.0, 0.0), "products": (0.0, 0.0), "gate_up": (None, 0.0), "full": (1.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one step, on one chip."""

    model: Operations  # what must be computed, over all chips: nothing counts twice for being computed again
    executed: float  # operations of one chip, what the policy computes again included
    moved: float  # bytes that its memory reads and writes


def full_batch(shapes: Batch, reach: int, memory: int) -> Batch:
    """A batch whose rows are full: one sample in each row, one grid in each bin. Patches are left out.

    Where samples have a window, it goes back as far as attention reaches, and every token sees all places of a sample's previous text.
    """
    rows, tokens = shapes.tokens.shape
    labels = np.full((rows, tokens), IGNORED, np.int32)
    labels[:, ::LABELS] = 0
    ones: Any = np.ones
    return dataclasses.replace(
        shapes,
        labels=labels,
        segments=ones((rows, tokens), np.int32),
        patch_valid=ones(shapes.patch_valid.shape, np.bool_),
        grids=ones(shapes.grids.shape, np.int32),
        eviction=None if shapes.eviction is None else _seen(shapes.eviction, reach, memory),
    )


def _seen(shapes: Eviction, reach: int, memory: int) -> Eviction:
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    start = np.maximum(np.arange(shapes.start.shape[1]) - reach, 0)
    stop = (np.arange(shapes.stop.shape[1]) < memory).astype(np.int32)
    return dataclasses.replace(zeros, start=np.broadcast_to(start, shapes.start.shape), stop=np.broadcast_to(stop, shapes.stop.shape))


def work(trainer: Trainer, shapes: Batch) -> Work:
    """Of a step with full rows."""
    trained = set(trainer.abstract_state().trained)
    rows, chips = shapes.tokens.shape[0], trainer.recipe.placement.mesh.size
    row = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), shapes)
    one = operations(trainer.model, full_batch(row, trainer.recipe.attention.reach, trainer.recipe.attention.memory), trained)
    whole = Operations(*(rows * part for part in dataclasses.astuple(one)))
    weights = any(path.startswith("text.layers.") and ".lora_" not in path for path in trained)
    products, attention = AGAIN[trainer.recipe.remat]
    if products is None:
        t = trainer.model.text
        products = 2 * t.hidden_size * t.intermediate_size / layer_parameters(t)
    again = whole.decoder / (3 if weights else 2) * products + whole.attention / 3 * attention + whole.head / 3
    return Work(whole, (whole.total + again) / chips, _moved(trainer, shapes))


def kept_bytes(trainer: Trainer, shapes: Batch, policy: str) -> float:
    """Of the decoder's layers, that one chip keeps for the backward pass of a micro-batch."""
    t, mesh = trainer.model.text, trainer.recipe.placement.mesh
    tokens = math.prod(shapes.tokens.shape) / trainer.config.accumulate / (mesh.size / mesh.shape["tensor"])
    head, tensor = t.head_dim or 0, mesh.shape["tensor"]
    inputs, out = t.hidden_size, t.hidden_size
    qkv = (t.num_attention_heads + 2 * t.num_key_value_heads) * head / tensor
    heads = t.num_attention_heads * head / tensor
    if trainer.recipe.attention.name != "xla":
        heads *= 2  # once as the kernel's own residual, once by name
    mlp = t.intermediate_size / tensor
    widths = {"full": inputs, "gate_up": inputs + out + qkv + heads}
    widths["products"] = widths["gate_up"] + 2 * mlp
    widths["nothing"] = widths["products"] + 2 * inputs + heads + 2 * mlp
    return tokens * t.num_hidden_layers * widths[policy] * _item(trainer)


def _item(trainer: Trainer) -> int:
    return 2 if trainer.config.dtype == "bfloat16" else 4


def _moved(trainer: Trainer, shapes: Batch) -> float:
    """Bytes: weights gathered (written) and read in the forward pass, again in the backward pass and by both its products, gradients of them
    written and read; the optimizer's reads and writes; what layers keep, written and read."""
    state, mesh, count = trainer.abstract_state(), trainer.recipe.placement.mesh, trainer.config.accumulate
    used = sum(math.prod(leaf.shape) for path, leaf in {**state.trained, **state.frozen}.items() if path.startswith("text."))
    item = _item(trainer)
    gathered = 2 if mesh.shape["fsdp"] > 1 else 0
    gradients = sum(math.prod(leaf.shape) for leaf in state.trained.values()) * item * 2
    passes = (used * item * (gathered + 3) + gradients) / mesh.shape["tensor"] * count
    optimizer = 2 * (shard_bytes(state.trained) + shard_bytes(state.moments)) + shard_bytes(state.trained)
    return passes + optimizer + 2 * count * kept_bytes(trainer, shapes, trainer.recipe.remat)


def shard_bytes(tree: Any) -> int:
    """Bytes of one chip's part of all arrays of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
