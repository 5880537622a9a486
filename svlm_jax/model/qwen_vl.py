"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: parameters, and the plain causal forward that researchers jit, differentiate, vmap and shard."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from svlm_jax.config import ModelConfig
from svlm_jax.model.layers import Declare, run_layers
from svlm_jax.model.rope import Rotation, mrope_rotation, rotate
from svlm_jax.model.text import Decoder
from svlm_jax.model.vision import Features, VisionTower
from svlm_jax.types import Array, Float, Int, Params, UInt8


class QwenVL(nnx.Module):
    """A vision tower and a decoder: two parameter trees and the equations over them. Without a `key` the parameters are shapes."""

    def __init__(self, config: ModelConfig, *, key: Array | None, dtype: Any = jnp.float32, stacked: bool = False):
        declare = Declare(key, dtype)
        self.vision = VisionTower(config.vision, declare)
        self.text = Decoder(config.text, declare, stacked=stacked)


@functools.lru_cache(maxsize=16)
def _abstract(config: ModelConfig, dtype: str, stacked: bool) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(QwenVL(config, key=None, dtype=jnp.dtype(dtype), stacked=stacked))


def is_stacked(params: Params) -> bool:
    """Whether the decoder's layers are one stacked layer (a dict of leaves) rather than a dict of layers."""
    return "qkv" in params["text"].get("layers", {})


def compute_dtype(params: Params) -> Any:
    """Of activations: that of the parameters which are never quantized."""
    return params["text"]["norm"].dtype


def bind(config: ModelConfig, params: Params) -> QwenVL:
    """The module of `config` with `params` in it; cheap, made anew inside every traced function."""
    graphdef, _ = _abstract(config, jnp.dtype(compute_dtype(params)).name, is_stacked(params))
    return nnx.merge(graphdef, params)


def abstract_params(config: ModelConfig, *, dtype: Any = jnp.float32, stacked: bool = False) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    return nnx.to_pure_dict(_abstract(config, jnp.dtype(dtype).name, stacked)[1])


def logical_axes(config: ModelConfig, *, stacked: bool = False) -> Params:
    """The parameter tree with each leaf's logical axes, a tuple of names."""
    state = _abstract(config, "float32", stacked)[1]
    return nnx.to_pure_dict(jax.tree.map(lambda v: v.get_metadata()["axes"], state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def init_params(config: ModelConfig, key: Array, *, dtype: Any = jnp.float32, stacked: bool = False) -> Params:
    """Random parameters, drawn on the device. `key` is a PRNG key; jit it with `out_shardings` to draw them sharded."""
    model = QwenVL(config, key=key, dtype=dtype, stacked=stacked)
    return nnx.to_pure_dict(nnx.state(model))


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Plain causal attention, softmax in float32; tokens see only their own segment where `segments` is given."""
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    mask = np.tri(length, dtype=bool)[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, heads, head_dim)


def decode_positions(
    text: Decoder,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T 3"],
    *,
    denominator: int = 1,
    deep: Sequence[Float[Array, "B T D"]] = (),
    segments: Int[Array, "B T"] | None = None,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Embeddings through all layers, causally, at the given coordinates (units of 1 / denominator).

    Args:
      deep: added to what the first layers put out (`deep_rows`).
    """
    c = text.config
    cos, sin = mrope_rotation(positions, axes=c.mrope_axes, theta=c.rope_theta, denominator=denominator)
    rotation = Rotation(cos[:, :, None], sin[:, :, None])

    def attend(q, k, v):
        return causal_attention(rotate(q, rotation), rotate(k, rotation), v, segments)

    return run_layers(text.layers, c.num_hidden_layers, lambda layer, y: layer(y, attend), x, added=deep, remat=remat)


def embed_prompt(
    model: QwenVL, tokens: Int[Array, "B T"], features: Float[Array, "B C D"] | None, places: Int[Array, "B C"] | None
) -> Float[Array, "B T D"]:
    """Token embeddings with vision features put in at `places`, rows of T; a place outside [0, T) is dropped."""
    x = model.text.embed(tokens)
    if features is None or places is None:
        return x
    return _put(x, features, places)


def _put(x: Float[Array, "B T D"], features: Float[Array, "B C D"], places: Int[Array, "B C"]) -> Float[Array, "B T D"]:
    return x.at[jnp.arange(x.shape[0])[:, None], places].set(features.astype(x.dtype), mode="drop")


def deep_rows(
    x: Float[Array, "B T D"], features: Features | None, places: Int[Array, "B C"] | None
) -> tuple[Float[Array, "B T D"], ...]:
    """What DeepStack adds to the decoder's first layers: nothing but at the vision pads of the prompt that `x` is the embedding of."""
    if features is None or places is None:
        return ()
    return tuple(_put(jnp.zeros_like(x), level, places) for level in features.deep)


def join_features(clips: Sequence[Features]) -> Features | None:
    """Those of a prompt's visuals, one after the other; None of none."""
    if not clips:
        return None
    deep = zip(*(clip.deep for clip in clips), strict=True)
    return Features(jnp.concatenate([clip.embedded for clip in clips], 1), tuple(jnp.concatenate(level, 1) for level in deep))


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T 3"],
    *,
    visuals: Sequence[UInt8[Array, "B _ 3 _ _"]] = (),
    places: Int[Array, "B C"] | None = None,
    denominator: int = 1,
    segments: Int[Array, "B T"] | None = None,
    remat: bool = False,
) -> Float[Array, "B T V"]:
    """Float32 logits at every position of a prompt of text, images and clips.

    Args:
      tokens: token ids, vision pads included.
      positions: (time, row, column) coordinates in units of 1 / denominator (`data.chat.lay_out` computes them).
      visuals: the clips and images in the prompt's order; an image is a clip of one frame.
      places: rows of the C vision pads, all visuals together, in order.
      segments: packed rows: tokens attend within their own segment only.
      remat: recompute every layer in the backward pass.
    """
    model = bind(config, params)
    features = join_features([vision_features(params, config, clip) for clip in visuals])
    x = embed_prompt(model, tokens, features.embedded if features else None, places)
    deep = deep_rows(x, features, places)
    x = decode_positions(model.text, x, positions, denominator=denominator, deep=deep, segments=segments, remat=remat)
    return model.text.logits(x)


def vision_features(params: Params, config: ModelConfig, frames: UInt8[Array, "B F 3 height width"]) -> Features:
    """What the vision tower makes of one clip (or image, F = 1) a row."""
    with jax.named_scope("vision"):
        return bind(config, params).vision(frames)


