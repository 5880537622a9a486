"""Eviction: which tokens leave before a round is appended, and what moves. Its cost does not depend on the windows.

Evicting is clearing validity bits. Every token behind a span that leaves moves left by the span's extent: one shift for
each region. Few keys move in memory, once, re-rotated by a known shift: the leaving turn's words (to the previous text),
the two closing tokens of the previous text, and, where the windows differ, one round's text or one round's clip.
Positions are in units of 1/unit. In "append" mode nothing shifts and nothing is re-rotated.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.streaming.layout import Field, Ring
from svlm_jax.streaming.moves import relocate
from svlm_jax.streaming.plan import Leaving, Move, Plan
from svlm_jax.streaming.shards import on_shards
from svlm_jax.streaming.state import StreamState
from svlm_jax.types import Array, Bool, Int, Slot

TIMED = (Field.TIME, Field.QUESTION)
ANSWER = (Field.ASSISTANT, Field.GENERATED)


def _span(state: StreamState, ring: Ring, round: Array, leaves: Bool[Array, "B"], *fields: Field) -> tuple[Leaving, ...]:
    """The valid slots of `fields` in one round's room, in the streams that lose it; a query leaves with the first round."""

    spec = state.spec

    def run(start: Slot, of: np.ndarray, leaves: Array) -> Leaving:
        slots = jax.lax.dynamic_slice_in_dim(state.valid, start, len(of), axis=1) & np.isin(of, fields) & leaves[:, None]
        pads = np.zeros(len(of), bool)
        if (of == Field.CLIP).any():
            pads[of == Field.CLIP] = spec.clip_pads
        tokens = jnp.sum(slots & ~pads, axis=1, dtype=jnp.int32)
        clip = jnp.any(slots & pads, axis=1)
        extent = tokens * spec.unit + jnp.where(clip, len(spec.visuals) * spec.pads_extent, 0)
        return Leaving(jnp.asarray(start, jnp.int32), slots, extent)

    room, of = ring.room(round), ring.room_fields
    inside = np.flatnonzero(np.isin(of, fields))
    first, stop = int(inside[0]), int(inside[-1]) + 1
    runs = [run(ring.start + room * ring.stride + first, of[first:stop], leaves)]
    if Field.QUESTION in fields and ring.question:
        runs.append(run(ring.slot(Field.QUESTION, room), np.full(ring.question, Field.QUESTION), leaves))
    if Field.QUERY in fields and ring.query:
        runs.append(run(ring.slot(Field.QUERY, room), np.full(ring.query, Field.QUERY), state.age == ring.horizon))
    return tuple(runs)


def _extent(span: Sequence[Leaving]) -> Int[Array, "B"]:
    return functools.reduce(operator.add, [run.extent for run in span])


def _words(state: StreamState, ring: Ring, round: Array, behind: Ring, leaves: Bool[Array, "B"]) -> Int[Array, "B"]:
    """Words of a round's turn: all its tokens but the last two, the closing <|im_end|> counted.

    The last sampled token, and the <|im_end|> of a turn that was cut, are pending tokens of the next round's room.
    """
    generated = jax.lax.dynamic_slice_in_dim(
        state.valid, ring.slot(Field.GENERATED, ring.room(round)), ring.size(Field.GENERATED), axis=1
    )
    run = jnp.sum(generated, axis=1, dtype=jnp.int32)
    first_pending = behind.slot(Field.PENDING, behind.room(round + 1))  # taken only if the turn was cut
    cut = jax.lax.dynamic_index_in_dim(state.valid, first_pending, axis=1, keepdims=False)
    return jnp.where(leaves, jnp.maximum(run - ~cut, 0), 0)


def _move(state: StreamState, target: Ring, delta: Int[Array, "B"], *fields: Field) -> Move:
    """The round that leaves ROUNDS takes a run of its fields to another ring; `delta` is their change of coordinate."""
    source = state.spec.cache.rounds
    round = state.round - source.horizon
    start, size = source.slot(fields[0], source.room(round)), source.size(*fields)
    # A ring of rooms has a free room for the round; the query has one place in a ring, which an older one may still hold
    query = fields[0] is Field.QUERY
    leaves = state.age == source.horizon if query else state.age >= source.horizon
    keep = jax.lax.dynamic_slice_in_dim(state.valid, start, size, axis=1) & leaves[:, None]
    if target.rooms == 1 and fields[0] is Field.PENDING:  # the turn that these end leaves for good in this very round
        keep &= (np.arange(size) >= source.size(Field.PENDING)) | (state.age < target.horizon)[:, None]
    start, stop = (jnp.asarray(slot, jnp.int32) for slot in (start, target.slot(fields[0], target.room(round))))
    return Move(start, stop, size, delta, keep, leaves if query else None)


def _equal_windows(state: StreamState) -> Plan:
    ring = state.spec.cache.rounds
    oldest, leaves = state.round - ring.horizon, state.age >= ring.horizon
    gone = _span(state, ring, oldest, leaves, Field.HEAD, *TIMED, Field.CLIP, Field.QUERY, Field.CLOSE, *ANSWER)
    gone += _span(state, ring, oldest + 1, leaves, Field.PENDING)
    words = _words(state, ring, oldest, ring, leaves)
    return Plan(gone, words, ring, ring.room(oldest), {ring.region: -_extent(gone)})


def _text_longer(state: StreamState, ring: Ring) -> Plan:
    """The oldest clip is dropped, its round's text moves to TEXT, and the oldest text-only round is dropped."""
    rounds = state.spec.cache.rounds
    oldest, leaves = state.round - ring.horizon, state.age >= ring.horizon
    blinded, blinds = state.round - rounds.horizon, state.age >= rounds.horizon
    behind = ring if ring.rooms > 1 else rounds  # the ring of the round after the oldest
    dropped = _span(state, ring, oldest, leaves, Field.HEAD, *TIMED, Field.QUERY, Field.CLOSE, *ANSWER)
    dropped += _span(state, behind, oldest + 1, leaves, Field.PENDING)
    clip = _span(state, rounds, blinded, blinds, Field.CLIP)
    moved = _span(state, rounds, blinded, blinds, Field.PENDING, Field.HEAD, *TIMED, Field.QUERY, Field.CLOSE, *ANSWER)
    words = _words(state, ring, oldest, behind, leaves)
    before = -_extent(dropped)
    lost = -_extent(clip)
    # u' - u = (p' + D') - (p + D): what stands before the clip keeps its place in TEXT, what stands after it closes up
    same = state.shift[:, ring.region] - state.shift[:, rounds.region]
    moves = [
        _move(state, ring, same, Field.PENDING, Field.HEAD, Field.TIME),
        _move(state, ring, same + lost, Field.CLOSE, Field.ASSISTANT, Field.GENERATED),
    ]
    if ring.question:
        moves.append(_move(state, ring, same, Field.QUESTION))
    if ring.query:
        moves.append(_move(state, ring, same + lost, Field.QUERY))
    entries = {ring.region: before, rounds.region: before + lost}
    return Plan(dropped + clip + moved, words, ring, ring.room(oldest), entries, tuple(moves))


def _vision_longer(state: StreamState, ring: Ring) -> Plan:
    """The oldest turn and its time are dropped, its round's clip moves to CLIPS, and the oldest vision-only round is dropped."""
    rounds = state.spec.cache.rounds
    oldest, leaves = state.round - ring.horizon, state.age >= ring.horizon
    muted, mutes = state.round - rounds.horizon, state.age >= rounds.horizon
    dropped = _span(state, ring, oldest, leaves, Field.HEAD, Field.CLIP, Field.QUERY, Field.CLOSE)
    timed = _span(state, rounds, muted, mutes, *TIMED)
    answer = _span(state, rounds, muted, mutes, *ANSWER) + _span(state, rounds, muted + 1, mutes, Field.PENDING)
    moved = _span(state, rounds, muted, mutes, Field.HEAD, Field.CLIP, Field.QUERY, Field.CLOSE)
    words = _words(state, rounds, muted, rounds, mutes)
    before, lost = -_extent(dropped), -_extent(timed)
    same = state.shift[:, ring.region] - state.shift[:, rounds.region]
    moves = [
        _move(state, ring, same, Field.HEAD),
        _move(state, ring, same + lost, Field.CLIP, Field.CLOSE),
    ]
    if ring.query:
        moves.append(_move(state, ring, same + lost, Field.QUERY))
    entries = {ring.region: before, rounds.region: before + lost - _extent(answer)}
    return Plan(dropped + timed + answer + moved, words, rounds, rounds.room(muted), entries, tuple(moves))


def evict(state: StreamState) -> StreamState:
    """The state before the next round is appended: rules 1 to 4 of the streaming semantics, in that order.

    Only streams that are old enough lose anything; a stream in its first round is left as it is. Modes "full" and
    "windows" never evict: the one ends at its capacity, the other starts anew.
    """
    if state.spec.stream.mode in ("full", "windows"):
        return state
    with jax.named_scope("evict"):
        cache = state.spec.cache
        if cache.text is not None:
            plan = functools.partial(_text_longer, ring=cache.text)
        elif cache.clips is not None:
            plan = functools.partial(_vision_longer, ring=cache.clips)
        else:
            plan = _equal_windows
        return on_shards(lambda own: relocate(own, plan), state)
