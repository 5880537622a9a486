"""From logits to the next token of every stream."""

import jax
import jax.numpy as jnp

from svlm_jax.config import StreamConfig
from svlm_jax.types import Array, Bool, Float, Int, Key


def visible_tokens(tokens: Int[Array, "B S"], valid: Bool[Array, "B S"], vocab_size: int) -> Bool[Array, "B V"]:
    """Which ids stand in valid slots."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), jnp.bool_).at[rows, tokens].max(valid)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Repetition penalty (arXiv 1909.05858, section 4.1): a seen id's logit is divided if positive, multiplied if negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """All but the k largest logits become -inf (ties with the k-th are kept)."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Nucleus (arXiv 1904.09751): the smallest set of most likely ids whose probability reaches p; at least one."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    share = jax.nn.softmax(ordered, axis=-1)
    inside = jnp.cumsum(share, axis=-1) - share < p
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def sample(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], keys: Key[Array, "B"], step: Int[Array, "B"], config: StreamConfig
) -> Int[Array, "B"]:
    """One id a stream. `keys` are the streams' own; `step` counts all their tokens, so neighbours and drivers change nothing."""
    with jax.named_scope("sample"):
        if config.repetition_penalty != 1.0:
            logits = penalize(logits, seen, config.repetition_penalty)
        if config.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / config.temperature
        if config.top_k is not None:
            logits = keep_top_k(logits, config.top_k)
        if config.top_p is not None and config.top_p < 1:
            logits = keep_top_p(logits, config.top_p)
        drawn = jax.vmap(lambda key, n, row: jax.random.categorical(jax.random.fold_in(key, n), row))
        return drawn(keys, step, logits).astype(jnp.int32)
