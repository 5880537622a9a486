"""Attention as in a stream: over the rounds that are still in the window, and over the previous text (`data.eviction`).

A query stands at one place among the rounds and at another behind the previous text, so it is rotated twice, and so are keys: as a round's, and
as previous text. Both are one attention over heads twice as wide, where keys of a kind have nothing in the other's half:

    scores = [q, q'] . [k, 0]  for tokens of the window        [q, q'] . [0, k']  for previous text

Queries go block by block, each of one sample. A window goes back only so far, so a block sees a run of the row's keys, and its sample's previous
text: time grows with the row and not with its square.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from svlm_jax.data import eviction
from svlm_jax.data.eviction import Eviction
from svlm_jax.types import Array, Bool, Float

TILE = 64  # lengths of keys are a multiple of this

Blocks = Callable[[Array, Array, Array, Array, float], Array]  # queries [b, Q, N, H], keys and values [b, S, K, H], mask [b, 1, Q, S], scale


class Streamed(NamedTuple):
    """Queries, keys and values of rows, before any rotation is lost: `window` at the row's coordinates, `memory` at the stream's."""

    window_queries: Float[Array, "B T N H"]
    memory_queries: Float[Array, "B T N H"]
    window_keys: Float[Array, "B T K H"]
    memory_keys: Float[Array, "B M K H"]
    values: Float[Array, "B T K H"]


def streamed_attention(x: Streamed, facts: Eviction, *, reach: int, memory: int, blocks: Blocks) -> Float[Array, "B T N H"]:
    """What each token makes of what it sees.

    Args:
      reach: tokens that a window goes back at most (`RowShape.reach`).
      memory: places of one sample (`RowShape.memory`).
      blocks: attention of each block of queries to keys of its own under a mask.
    """
    rows, tokens, heads, width = x.window_queries.shape
    size = eviction.BLOCK
    back = -(-min(reach, tokens) // TILE) * TILE
    count = -(-tokens // size)
    fill = count * size - tokens

    def queries(a: Array) -> Array:
        """[B, T, ...] in blocks [B, n, size, ...]."""
        a = jnp.pad(a, [(0, 0), (0, fill), *[(0, 0)] * (a.ndim - 2)])
        return a.reshape(rows, count, size, *a.shape[2:])

    def keys(a: Array) -> Array:
        """[B, T, ...] as each block may see them [B, n, back + size, ...]."""
        a = jnp.pad(a, [(0, 0), (back, fill), *[(0, 0)] * (a.ndim - 2)])
        return jnp.stack([a[:, n * size : n * size + back + size] for n in range(count)], axis=1)

    # A block's sample is the one whose places are not all of rounds that are over when it begins
    over = facts.stop[:, None] <= queries(facts.round)[:, :, :1]
    sample = jnp.argmin(over, -1) // memory

    def words(a: Array) -> Array:
        """[B, M, ...] as each block may see them [B, n, places of a sample, ...]."""
        a = a.reshape(rows, -1, memory, *a.shape[2:])
        a = jnp.pad(a, [(0, 0), (0, 0), (0, -memory % TILE), *[(0, 0)] * (a.ndim - 3)])
        return jnp.take_along_axis(a, sample.reshape(rows, count, *[1] * (a.ndim - 2)), axis=1)

    nothing = [(0, 0)] * (x.values.ndim - 1)
    window_keys = jnp.pad(x.window_keys, [*nothing, (0, width)])
    memory_keys = jnp.pad(x.memory_keys, [*nothing, (width, 0)])
    memory_values = jnp.take_along_axis(x.values, facts.source[..., None, None], axis=1)
    q = queries(jnp.concatenate([x.window_queries, x.memory_queries], -1))
    k = jnp.concatenate([keys(window_keys), words(memory_keys)], 2)
    v = jnp.concatenate([keys(x.values), words(memory_values)], 2)
    v = jnp.pad(v, [*[(0, 0)] * (v.ndim - 1), (0, width)])  # library kernels want heads of one width
    mask = _mask(facts, queries, words, count=count, size=size, back=back)

    def flat(a: Array) -> Array:
        return a.reshape(rows * count, *a.shape[2:])

    found = blocks(flat(q), flat(k), flat(v), flat(mask)[:, None], width**-0.5)
    return found[..., :width].reshape(rows, count * size, heads, width)[:, :tokens]


def _mask(facts: Eviction, queries, words, *, count: int, size: int, back: int) -> Bool[Array, "B n Q S"]:
    """Who sees what: tokens of the window, then previous text."""
    start, round = queries(facts.start)[..., None], queries(facts.round)[..., None]
    place = (jnp.arange(count)[:, None] * size + jnp.arange(size))[None, :, :, None]
    key = (jnp.arange(count)[:, None] * size + jnp.arange(back + size) - back)[None, :, None]
    window = (start <= key) & (key <= place) & (key >= 0)
    source, first, stop = (words(a)[:, :, None] for a in (facts.source, facts.first, facts.stop))
    return jnp.concatenate([window, (first <= round) & (round < stop) & (source <= place)], -1)


def plain_blocks(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """By XLA, a block at a time, whose scores are computed again in the backward pass."""

    @jax.checkpoint
    def block(inputs: tuple[Array, ...]) -> Array:
        q, k, v, mask = (a[None] for a in inputs)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")[0]

    return jax.lax.map(block, (q, k, v, mask))
