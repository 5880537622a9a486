"""One stream out of a batch and back into it, into any row of any engine of the same spec, at any round.

Rings of rooms are indexed by the engine's count of rounds, so a stream that comes back when another room is next finds its rooms turned
by the difference. What it then attends to is the same; sums run in another order, unless the difference is 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.streaming.layout import CacheLayout
from svlm_jax.streaming.state import StreamState
from svlm_jax.types import Array, Int

SLOT_AXES = {"k": 2, "v": 2, "embeddings": 2, "valid": 1, "tokens": 1, "coordinates": 2}


def turned_slots(cache: CacheLayout, rounds: int) -> Int[np.ndarray, "S"]:
    """For every slot, the one that it takes its content from where the engine is `rounds` rounds further than the stream knew it."""
    order = np.arange(cache.slots, dtype=np.int32)
    for ring in (cache.text, cache.clips, cache.rounds):
        if ring is None:
            continue
        before = (np.arange(ring.rooms) - rounds) % ring.rooms
        questions = ring.start + ring.rooms * ring.stride
        for start, size in ((ring.start, ring.stride), (questions, ring.question)):
            taken = start + before[:, None] * size + np.arange(size)
            order[start : start + ring.rooms * size] = taken.reshape(-1)
    return order


def read_row(state: StreamState, row: Int[Array, ""]) -> StreamState:
    """The stream in a row, as the state of a batch of one. `state` is not donated and stays as it is."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1) if x.ndim else x, state.replace(round=None))
    return one.replace(round=state.round)


def write_row(state: StreamState, one: StreamState, row: Int[Array, ""], order: Int[Array, "S"]) -> StreamState:
    """Puts a stream into a row, each slot filled from slot `order[slot]` of `one`. `state` is donated; its count of rounds stays."""

    def put(into: Array, rows: Array) -> Array:
        return jax.lax.dynamic_update_slice(into, rows.astype(into.dtype), (row, *([0] * (into.ndim - 1))))

    turned = {
        name: jax.tree.map(lambda x, axis=axis: jnp.take(x, order, axis=axis), getattr(one, name)) for name, axis in SLOT_AXES.items()
    }
    one = one.replace(**turned, round=None)
    return jax.tree.map(put, state.replace(round=None), one).replace(round=state.round)


read_compiled = jax.jit(read_row)
write_compiled = jax.jit(write_row, donate_argnames="state")
