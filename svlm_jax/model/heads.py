"""Key-value heads, repeated where there are fewer than shards: every shard of a tensor axis then attends with a head of its own.

K heads with G queries each become K * r heads with ceil(G / r) queries: the same keys and values, the queries dealt out among the copies.
A query that is missing at the end is one of zeros, whose output meets weights of zeros. What a model says stays the same.
"""

import dataclasses

import jax
import jax.numpy as jnp

from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.types import Array

PARTS = ("qkv", "qkv_bias", "out")  # of a decoder layer: what has a key-value axis


def repeats(config: ModelConfig, shards: int) -> int:
    """How often each key-value head is needed so that `shards` shards have the same number of them. UserError where that cannot be."""
    t = config.text
    if t.num_key_value_heads % shards == 0:
        return 1
    if shards % t.num_key_value_heads:
        raise UserError(
            f"tensor = {shards} does not go with the {t.num_key_value_heads} key-value heads of {config.name}: "
            f"choose a number that divides {t.num_key_value_heads}, or a multiple of it"
        )
    if shards > t.num_attention_heads:
        raise UserError(f"tensor = {shards} is more than the {t.num_attention_heads} attention heads of {config.name}: choose fewer")
    return shards // t.num_key_value_heads


def repeated(config: ModelConfig, times: int) -> ModelConfig:
    """The model with every key-value head `times` times."""
    if times == 1:
        return config
    t = config.text
    heads = t.num_key_value_heads * times
    groups = -(-(t.num_attention_heads // t.num_key_value_heads) // times)
    return dataclasses.replace(config, text=dataclasses.replace(t, num_key_value_heads=heads, num_attention_heads=heads * groups))


def repeat_weight(name: str, weight: Array, times: int) -> Array:
    """One of `PARTS`, for a model of `repeated`: qkv [D, K, G+2, H], qkv_bias [K, G+2, H] or out [K, G, H, D], of one layer."""
    axis = {"qkv": 1, "qkv_bias": 0, "out": 0}[name]  # of the key-value heads; the queries are behind it

    def dealt(queries: Array) -> Array:
        groups = queries.shape[axis + 1]
        each = -(-groups // times)
        edges = [(0, times * each - groups) if index == axis + 1 else (0, 0) for index in range(queries.ndim)]
        shape = (*queries.shape[:axis], queries.shape[axis] * times, each, *queries.shape[axis + 2 :])
        return jnp.pad(queries, edges).reshape(shape)

    if name == "out":
        return dealt(weight)
    queries, cached = jnp.split(weight, [weight.shape[axis + 1] - 2], axis + 1)
    return jnp.concatenate([dealt(queries), jnp.repeat(cached, times, axis)], axis + 1)


repeat_compiled = jax.jit(repeat_weight, static_argnames=("name", "times"))
