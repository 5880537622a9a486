"""Embeddings of packed rows, with the vision features in their places."""

import jax
import jax.numpy as jnp

from svlm_jax.data.batch import PADDING, Batch
from svlm_jax.model.qwen_vl import QwenVL
from svlm_jax.types import Array, Bool, Float, Int


@jax.custom_vjp
def look_up(embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], used: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
    """The tokens' rows. Only those of `used` have a gradient, and it is summed in float32.

    A bfloat16 sum stops growing after some hundred equal terms, and frequent tokens have thousands. What is not used (every patch of
    video is the same token) would all be added to one row, which a GPU does one after the other.
    """
    return embedding[tokens]


def _back(kept: tuple[Array, Array, Array], gradient: Float[Array, "B T D"]) -> tuple[Array, None, None]:
    embedding, tokens, used = kept
    total = jnp.zeros(embedding.shape, jnp.float32)
    total = total.at[jnp.where(used, tokens, len(embedding))].add(gradient.astype(jnp.float32), mode="drop")
    return total.astype(embedding.dtype), None, None


look_up.defvjp(lambda embedding, tokens, used: (embedding[tokens], (embedding, tokens, used)), _back)


def embedded(model: QwenVL, batch: Batch, features: Float[Array, "B C D"]) -> Float[Array, "B T D"]:
    """What the decoder is given: words' embeddings, and features at `batch.places`, of which those outside [0, T) are dropped."""
    at = _places(batch)
    seen = jnp.zeros(batch.tokens.shape, bool).at[at].set(True, mode="drop")
    x = look_up(model.text.embedding[...], batch.tokens, ~seen & (batch.segments != PADDING))
    return x.at[at].set(features.astype(x.dtype), mode="drop")


def deepened(x: Float[Array, "B T D"], batch: Batch, deep: Float[Array, "N B C D"], layer: Int[Array, ""]) -> Float[Array, "B T D"]:
    """What layer number `layer` put out, with DeepStack's features for it added at `batch.places`; behind the first N layers, as it is."""
    at = _places(batch)

    def add(x: Array) -> Array:
        return x.at[at].add(deep[jnp.minimum(layer, len(deep) - 1)].astype(x.dtype), mode="drop")

    return jax.lax.cond(layer < len(deep), add, lambda x: x, x)


def _places(batch: Batch) -> tuple[Array, Array]:
    """Rows and tokens of the features of a batch."""
    rows = len(batch.tokens)
    return jnp.arange(rows)[:, None], batch.places.reshape(rows, -1)
