"""Packed rows through the model: bins of patches to features, features to their tokens, tokens through the layers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from svlm_jax.config import ModelConfig
from svlm_jax.data.batch import Batch
from svlm_jax.errors import UserError
from svlm_jax.model.packed_vision import packed_features
from svlm_jax.model.qwen_vl import QwenVL, bind, is_stacked, logical_axes
from svlm_jax.model.rope import Rotation, mrope_rotation, rotate
from svlm_jax.model.vision import Features
from svlm_jax.training.attention import Attention
from svlm_jax.training.embedding import deepened, embedded
from svlm_jax.training.lora import Adapters
from svlm_jax.training.placement import Placement
from svlm_jax.training.remat import rematerialised
from svlm_jax.training.streamed_attention import Streamed
from svlm_jax.types import Array, Float, Params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the forward pass runs; what it computes does not depend on it."""

    attention: Attention
    placement: Placement
    unit: int  # positions are in units of 1 / unit
    remat: str  # of decoder layers, a name of `training.remat`
    vision_remat: str  # of vision blocks, where they are trained


def hidden_states(
    params: Params, config: ModelConfig, batch: Batch, recipe: Recipe, adapters: Adapters | None = None
) -> tuple[QwenVL, Float[Array, "B T D"]]:
    """(the model, with all but its layers gathered; the last layer's output). The parameters' layers are to be stacked.

    A mesh's fsdp axis leaves each weight in pieces: they are gathered where they are used, a layer at a time.
    """
    if not is_stacked(params):
        raise UserError("training takes stacked layers: load or draw the parameters with stacked=True")
    place, axes = recipe.placement, logical_axes(config, stacked=True)
    layers = params["text"]["layers"]
    ends = place.gather({k: v for k, v in params["text"].items() if k != "layers"}, {k: v for k, v in axes["text"].items() if k != "layers"})
    model = bind(config, {"vision": place.gather(params["vision"], axes["vision"]), "text": {**ends, "layers": layers}})
    with jax.named_scope("vision"):
        features = _features(model, batch, recipe)
    with jax.named_scope("embed"):
        x = place.rows(embedded(model, batch, features.embedded))
    with jax.named_scope("decoder"):
        return model, _decode(model, x, batch, recipe, features.deep, axes["text"]["layers"], adapters or Adapters())


def _features(model: QwenVL, batch: Batch, recipe: Recipe) -> Features:
    """Of the C tokens of each row's bins."""
    rows, count = batch.grids.shape[:2]
    place = recipe.placement

    def bins(array: Array) -> Array:
        return place.bins(array.reshape(rows * count, *array.shape[2:]), count=count)

    def wrap(run: Callable[..., Array]) -> Callable[..., Array]:
        def placed(block, x, *rest):
            return place.bins(run(block, x, *rest), count=count)

        def pure(state, graphdef, *arrays):
            return placed(nnx.merge(graphdef, state), *arrays)

        def call(block, *arrays):
            graphdef, state = nnx.split(block)
            again = rematerialised(lambda state, *arrays: pure(state, graphdef, *arrays), recipe.vision_remat, scanned=False)
            return again(state, *arrays)

        return call

    arrays = [bins(a) for a in (batch.patches, batch.patch_coordinates, batch.patch_valid, batch.grids)]
    features = packed_features(model.vision, *arrays, attention=recipe.attention.vision, windows=recipe.attention.windows, wrap=wrap)
    return jax.tree.map(lambda a: a.reshape(rows, -1, a.shape[-1]), features)


def _decode(
    model: QwenVL,
    x: Array,
    batch: Batch,
    recipe: Recipe,
    deep: Sequence[Array],
    axes: dict[str, tuple[str | None, ...]],
    adapters: Adapters,
) -> Array:
    c, place = model.text.config, recipe.placement

    def rotation_at(positions: Array) -> Rotation:
        cos, sin = mrope_rotation(positions, axes=c.mrope_axes, theta=c.rope_theta, denominator=recipe.unit)
        return Rotation(*(place.rows(a)[:, :, None] for a in (cos, sin)))

    rotation, facts = rotation_at(batch.positions), batch.eviction
    if facts is None:

        def attend(q: Array, k: Array, v: Array) -> Array:
            return recipe.attention.decoder(rotate(q, rotation), rotate(k, rotation), v, batch.segments)
    else:
        in_stream = rotation_at(batch.positions - facts.shift[..., None])
        as_words = rotation_at(jnp.repeat(facts.coordinate[..., None], 3, -1))

        def attend(q: Array, k: Array, v: Array) -> Array:
            words = jnp.take_along_axis(k, facts.source[..., None, None], axis=1)
            there = Streamed(rotate(q, rotation), rotate(q, in_stream), rotate(k, rotation), rotate(words, as_words), v)
            return recipe.attention.streamed(there, facts)

    graphdef, state = nnx.split(model.text.layers)
    layers: Any = nnx.to_pure_dict(state)
    unstacked = {name: axes[name][1:] for name in layers}
    levels = jnp.stack(deep) if deep else None

    def layer(x: Array, inputs: tuple[Any, Adapters, Array]) -> tuple[Array, None]:
        weights, adapters, index = inputs
        x = nnx.merge(graphdef, place.gather(weights, unstacked))(x, attend, adapters.product)
        return place.rows(x if levels is None else deepened(x, batch, levels, index)), None

    body = rematerialised(layer, recipe.remat, scanned=True)
    x, _ = jax.lax.scan(body, x, (layers, adapters, jnp.arange(c.num_hidden_layers)), length=c.num_hidden_layers)
    return x
