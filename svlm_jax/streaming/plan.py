"""What one eviction is about to do, read off the state before anything is written: what leaves, what moves, which words join."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from svlm_jax.streaming.layout import Ring
from svlm_jax.types import Array, Bool, Int, Slot


class Block(NamedTuple):
    """What will be written into a buffer, and where."""

    rows: Any  # an array, or a cache's `Int8Rows`
    at: tuple[Array | int, ...]  # on the first axes; all of the others

    def placed(self) -> "Block":
        """With its place in arrays, as it comes out of a branch."""
        return Block(self.rows, tuple(jnp.asarray(i, jnp.int32) for i in self.at))


class Leaving(NamedTuple):
    """A run of slots, at the same place in every stream, of which some leave."""

    start: Slot
    slots: Bool[Array, "B size"]  # those that hold a token that leaves
    extent: Int[Array, "B"]  # positions that they take


@functools.partial(jax.tree_util.register_dataclass, data_fields=["source", "target", "delta", "keep", "goes"], meta_fields=["size"])
@dataclasses.dataclass(frozen=True)
class Move:
    """A run of slots that changes place, at the same slots in every stream."""

    source: Slot
    target: Slot
    size: int
    delta: Int[Array, "B"]  # change of the coordinate u
    keep: Bool[Array, "B size"]  # which of them are valid at the target
    goes: Bool[Array, "B"] | None = None  # streams whose slots move; None: the target is free in all others

    def block(self, x: Any, rows: Any, axis: int) -> Block:
        """`rows` for the target, where this stream's slots move."""

        def moved(x: Array, rows: Array) -> Array:
            if self.goes is None:
                return rows
            goes = self.goes.reshape(-1, *(1,) * (x.ndim - 1))
            return jnp.where(goes, rows, jax.lax.dynamic_slice_in_dim(x, self.target, self.size, axis))

        return Block(jax.tree.map(moved, x, rows), (*(0,) * axis, self.target))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["gone", "words", "words_room", "entries", "moves"], meta_fields=["words_ring"]
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """What one eviction does to the rounds; the previous text follows from `words`."""

    gone: tuple[Leaving, ...]  # what is cleared, moved slots included
    words: Int[Array, "B"]  # words of the leaving turn
    words_ring: Ring  # where they stand
    words_room: Array
    entries: dict[int, Int[Array, "B"]]  # region -> change of its positions, the previous text's growth left out
    moves: tuple[Move, ...] = ()


class Words(NamedTuple):
    """How the previous text changes. Word n of a stream stands in the sink, or in the ring at (n - sink) mod ring."""

    source: Slot  # first slot of the leaving turn's words
    sink: Int[Array, "B sink"]  # which of the turn's words each sink slot takes; -1: none
    ring: Int[Array, "B ring"]
    delta: Int[Array, "B M-1"]  # change of coordinate of each of the turn's words
    closing: Int[Array, "B"]  # coordinate of the first closing token behind them
    growth: Int[Array, "B"]  # positions that all behind the previous text move right
    cut: Int[Array, "B"]  # positions that the ring's words move left
