"""Older words are read anew every few rounds, as the text that they are in training.

A word that leaves its window keeps the keys and values it was said with, among pictures that have since left. Models are trained on previous
text that stands before all pictures, and may not find in it what was said: every `text_refresh` rounds of a stream, its system prompt and
previous text are run by themselves, and their slots take the keys and values that come out. Facts stay as they are: what is visible, and
where, does not depend on it, and neither do the rounds.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.ring_attention.int8 import Rows, stored_as
from svlm_jax.model.qwen_vl import QwenVL
from svlm_jax.model.rope import Rotation, rotate
from svlm_jax.sharding import Rules
from svlm_jax.streaming.alone import run_alone
from svlm_jax.streaming.state import StreamState
from svlm_jax.types import Array, Bool, Float, Int


def refresh(model: QwenVL, state: StreamState, active: Bool[Array, "B"]) -> StreamState:
    """The state with the previous text of the streams that are due read anew.

    Streams are gone through one by one (on a mesh: as many at once as it has shards of streams), so that a round costs what is due.
    """
    stream, cache = state.spec.stream, state.spec.cache
    if not stream.text_refresh or stream.mode != "streaming":
        return state
    due = active & (state.age > 0) & (state.age % stream.text_refresh == 0)  # streams that joined at other times have other rounds
    slots = cache.regions[cache.words_region][1]
    order, place = _sequence(state)
    sizes = np.array([stop - start for start, stop in cache.regions])
    shift = jnp.repeat(state.shift, sizes, axis=1, total_repeat_length=cache.slots)[:, None, :slots]
    u = state.coordinates[:, :, :slots]

    def ordered(x: Array) -> Array:
        index = order.reshape(order.shape[0], *(1,) * (x.ndim - 2), order.shape[1])
        return jnp.take_along_axis(x, index, axis=-1)

    facts = {
        "due": due,
        "place": place,
        "tokens": ordered(state.tokens),
        "valid": ordered(state.valid),
        "positions": jnp.moveaxis(ordered(u - shift), 1, 2),
        "coordinates": jnp.moveaxis(ordered(u), 1, 2),
    }
    held = jax.tree.map(lambda x: x[:, :, :slots], (state.k, state.v)), state.closing
    shards = jax.typeof(state.valid).sharding.mesh.shape.get(Rules().streams, 1)

    def one(inputs: tuple[dict[str, Array], Any]) -> Any:
        facts, held = inputs
        return jax.lax.cond(jnp.any(facts["due"]), lambda held: _reread(model, state, facts, held), lambda held: held, held)

    with jax.named_scope("refresh"):
        (k, v), closing = _ungrouped(jax.lax.map(one, _grouped((facts, held), shards)))
    return state.replace(k=_put(state.k, k), v=_put(state.v, v), closing=closing)


def _reread(model: QwenVL, state: StreamState, facts: dict[str, Array], held: Any) -> Any:
    """`held`, the slots of the previous text in every layer, with fresh keys and values in the streams that are due."""
    spec = state.spec
    (k, v), closing = held
    closes = len(spec.prompt.block_close)

    def turn(coordinates: Int[Array, "B T 3"]) -> Rotation:
        return Rotation(*(a[:, :, None] for a in spec.rotation(coordinates)))

    def due(fresh: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(facts["due"].reshape(-1, *(1,) * (b.ndim - 1)), a.astype(b.dtype), b), fresh, old)

    def stored(old: Rows, rows: Float[Array, "B T K H"]) -> Rows:
        placed = jnp.take_along_axis(rows, facts["place"][:, :, None, None], axis=1)
        return due(stored_as(old, jnp.swapaxes(placed, 1, 2)), old)

    at, kept_k, kept_v, kept_closing = turn(facts["coordinates"]), list(k), list(v), list(closing)

    def keep(layer: int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]) -> None:
        kept_k[layer], kept_v[layer] = stored(k[layer], rotate(keys, at)), stored(v[layer], values)
        if closing:
            kept_closing[layer] = due(jnp.swapaxes(keys[:, -closes:], 1, 2), closing[layer])

    run_alone(model, model.text.embed(facts["tokens"]), facts["valid"], turn(facts["positions"]), keep)
    return (tuple(kept_k), tuple(kept_v)), tuple(kept_closing)


def _sequence(state: StreamState) -> tuple[Int[Array, "B T"], Int[Array, "B slots"]]:
    """The slots of the previous text in the order of the sequence, and for each slot its place there (0 for slots that hold none of it)."""
    cache = state.spec.cache
    head, close = np.arange(cache.closing_slot), np.arange(cache.closing_slot, cache.spill_slot)  # the spill is gone by now
    slots = np.zeros(cache.regions[cache.words_region][1], np.int32)
    slots[head], slots[close] = head, len(head) + cache.ring + np.arange(len(close))
    ring = np.arange(cache.ring)
    # Word n stands in the ring at (n - sink) mod ring: the oldest one that is left is the first
    oldest = jnp.maximum(state.words - cache.sink - cache.ring, 0)[:, None]
    streams = oldest.shape[0]
    words = jnp.mod(oldest + ring, max(cache.ring, 1)) + cache.words_start
    order = jnp.concatenate([jnp.broadcast_to(head, (streams, len(head))), words, jnp.broadcast_to(close, (streams, len(close)))], axis=1)
    place = jnp.broadcast_to(slots, (streams, len(slots)))
    place = place.at[:, cache.words_start : cache.words_start + cache.ring].set(len(head) + jnp.mod(ring - oldest, max(cache.ring, 1)))
    return order, place


def _grouped(tree: Any, shards: int) -> Any:
    """[B, ...] as [B / shards, shards, ...]: a stream of every shard at a time."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(shards, -1, *x.shape[1:]), 0, 1), tree)


def _ungrouped(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def _put(layers: tuple[Rows, ...], blocks: tuple[Rows, ...]) -> tuple[Rows, ...]:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, 0, axis=2), layers, blocks)
