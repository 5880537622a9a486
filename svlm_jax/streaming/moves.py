"""Carrying out an eviction: shifts of regions, runs of slots that change place, and words that join the previous text.

All blocks are read before any is written, with a barrier between: a TPU compiler otherwise copies every buffer that is
both read and written. Streams share the rooms' indices, so a round's blocks move for all streams at once; only the
places of words differ, and those are written stream by stream.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from svlm_jax.kernels.ring_attention.int8 import Int8Rows, Rows, quantize_rows, stored_as, widen
from svlm_jax.model.rope import Rotation, rotate, shift_rotation
from svlm_jax.streaming.layout import CacheLayout, Field
from svlm_jax.streaming.plan import Block, Leaving, Plan, Words
from svlm_jax.streaming.state import StreamState
from svlm_jax.types import Array, Bool, Int, Slot


def clear(valid: Bool[Array, "B S"], runs: Sequence[Leaving]) -> Bool[Array, "B S"]:
    """`valid` without what leaves: blocks of a room's size are rewritten, whatever the number of rooms."""
    for start, leaves, _ in runs:
        block = jax.lax.dynamic_slice_in_dim(valid, start, leaves.shape[1], axis=1) & ~leaves
        valid = jax.lax.dynamic_update_slice_in_dim(valid, block, start, axis=1)
    return valid


def _words(state: StreamState, plan: Plan) -> Words:
    spec, cache, unit = state.spec, state.spec.cache, state.spec.unit
    sink, ring, count = cache.sink, cache.ring, plan.words
    before, after = state.words, state.words + count

    seen = sum(jnp.sum(state.valid[:, run], axis=1, dtype=jnp.int32) for run in cache.words_slots())
    kept = jnp.minimum(after, sink) + jnp.clip(after - sink, 0, ring)
    cut = jnp.where(state.age > 0, seen + count - kept, 0)

    place = jnp.arange(sink)
    into_sink = jnp.where((place >= before[:, None]) & (place < after[:, None]), place - before[:, None], -1)
    into_ring = jnp.zeros((count.shape[0], 0), jnp.int32)
    if ring:
        last = after[:, None] - 1
        newest = last - jnp.mod(last - sink - jnp.arange(ring), ring)  # the newest word that this place can hold
        into_ring = jnp.where(newest >= jnp.maximum(before, sink)[:, None], newest - before[:, None], -1)

    source = plan.words_ring.slot(Field.GENERATED, plan.words_room)
    size = spec.stream.max_new_tokens - 1
    old = jax.lax.dynamic_slice_in_dim(state.coordinates[:, 0], source, size, axis=1) if size else state.coordinates[:, 0, :0]
    index = jnp.arange(size)
    closing = state.coordinates[:, 0, cache.closing_slot][:, None]  # where the first word goes; SINK never shifts
    # A word of the ring moves left by the cut, and the ring's shift takes that back: u' is the same with and without it
    in_ring = before[:, None] + index >= sink
    new = closing + index * unit + jnp.where(in_ring, state.shift[:, cache.words_region][:, None], 0)
    delta = new - old
    if spec.stream.positions == "append":
        delta = jnp.zeros_like(delta)
    growth = (count - cut) * unit
    return Words(source, into_sink, into_ring, delta, closing[:, 0] + growth, growth, cut * unit)


def _windows(cache: CacheLayout, before: Int[Array, ""], size: int) -> list[tuple[Int[Array, ""], int, bool]]:
    """(first place, places, in the ring) of the runs that hold a turn's new words: in the sink, and in the ring up to its seam and behind it."""
    runs = []
    if cache.sink and size:
        run = min(size, cache.sink)
        runs.append((jnp.clip(before, 0, cache.sink - run), run, False))
    if cache.ring and size:
        run = min(size, cache.ring)
        first = jnp.mod(jnp.maximum(before - cache.sink, 0), cache.ring)
        runs.append((jnp.minimum(first, cache.ring - run), run, True))
        if run < cache.ring:
            runs.append((jnp.zeros((), jnp.int32), run, True))
    return runs


def _word_blocks(cache: CacheLayout, x: Rows, said: Rows, words: Words, before: Int[Array, "B"]) -> list[Block]:
    """The runs of previous text that change, stream by stream: `said` [B, K, M-1, H], the turn's words as they will be kept, put in."""
    blocks = []
    for b in range(x.shape[0]):
        for first, run, in_ring in _windows(cache, before[b], said.shape[2]):
            places = words.ring[b] if in_ring else words.sink[b]
            take = jax.lax.dynamic_slice_in_dim(places, first, run)
            at = (b, 0, first + (cache.words_start if in_ring else cache.header))

            def joined(x: Array, said: Array, b=b, take=take, at=at) -> Array:
                old = jax.lax.dynamic_slice(x, _padded(at, x), (1, x.shape[1], take.shape[0], *x.shape[3:]))
                new = jnp.take(said[b : b + 1], jnp.maximum(take, 0), axis=2)
                return jnp.where((take >= 0).reshape(-1, *(1,) * (x.ndim - 3)), new, old)

            blocks.append(Block(jax.tree.map(joined, x, said), at))
    return blocks


def _read_first(x: Any, read: Callable[[Any], Any], go: Bool[Array, ""]) -> tuple[Any, Any]:
    """x, and what `read` reads from it, with a barrier between all reads of x and all writes to it, which can so be in place.

    On a CPU the compiler drops barriers before it fuses reads into writes, which costs a copy of the whole buffer; but it
    keeps a branch whose outcome it cannot know (`go`), and materialises what comes out.
    """

    def branch(x: Any) -> tuple[Any, Any]:
        nothing = jax.eval_shape(read, x)
        return x, jax.lax.cond(go, read, lambda _: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nothing), x)

    return jax.lax.platform_dependent(x, cpu=branch, default=lambda x: jax.lax.optimization_barrier((x, read(x))))


def _padded(at: tuple[Array | int, ...], x: Array) -> tuple[Array | int, ...]:
    return (*at, *(0,) * (x.ndim - len(at)))


def _put(x: Any, blocks: Sequence[Block]) -> Any:
    for rows, at in blocks:
        x = jax.tree.map(lambda leaf, new, at=at: jax.lax.dynamic_update_slice(leaf, new, _padded(at, leaf)), x, rows)
    return x


def _corner(x: Rows) -> Array:
    """One float of a buffer."""
    last = jax.tree.leaves(x)[-1]
    return last[(0,) * last.ndim]


def relocate(state: StreamState, make_plan: Callable[[StreamState], Plan]) -> StreamState:
    """Clears what leaves, moves what moves, and updates every shift, as `make_plan` says of the state as it is."""
    spec, cache = state.spec, state.spec.cache
    append = spec.stream.positions == "append"
    closing = slice(cache.closing_slot, cache.closing_slot + len(spec.prompt.block_close))
    go = state.round >= 0  # always true, which the compiler cannot know

    def read(facts: dict[str, Array]) -> tuple[Plan, Words, dict[str, list[Block]]]:
        now = state.replace(**facts)
        plan = make_plan(now)
        words = _words(now, plan)
        return plan, words, _fact_blocks(now, plan, words, closing)

    facts, (plan, words, fact_blocks) = _read_first({name: getattr(state, name) for name in ("valid", "tokens", "coordinates")}, read, go)
    valid = clear(facts["valid"], plan.gone)
    for move in plan.moves:
        valid = _put(valid, [move.block(valid, move.keep, 1)])  # what stays at the target is what has just been left there
    valid = _put(valid, fact_blocks["valid"])
    tokens, coordinates = (_put(facts[name], fact_blocks[name]) for name in ("tokens", "coordinates"))
    shift, next_position = state.shift, state.next_position
    if not append:
        if cache.ring:
            shift = shift.at[:, cache.words_region].add(words.cut)
        for region, entry in plan.entries.items():
            shift = shift.at[:, region].add(-(words.growth + entry))
        next_position = next_position + words.growth + plan.entries[cache.rounds.region]
    return state.replace(
        **_moved_buffers(state, plan, words, closing, go),
        valid=valid,
        tokens=tokens,
        coordinates=coordinates,
        shift=shift,
        next_position=next_position,
        words=state.words + plan.words,
    )


def _turned(rows: Rows, turn: Rotation) -> Rows:
    """Keys rotated further. In eight bits each is rounded once more, which happens to a key as often as it changes its place: three times at most."""
    return quantize_rows(rotate(widen(rows, jnp.float32), turn)) if isinstance(rows, Int8Rows) else rotate(rows, turn)


def _moved_buffers(state: StreamState, plan: Plan, words: Words, closing: slice, go: Bool[Array, ""]) -> dict[str, tuple[Rows, ...]]:
    """Keys and values with all that changes its place or its coordinate."""
    spec, cache, t = state.spec, state.spec.cache, state.spec.model.text
    size = words.delta.shape[1]

    def turning(delta: Int[Array, "..."]) -> Rotation | None:
        """By a change of coordinate, for all heads."""
        if spec.stream.positions == "append":
            return None
        turn = shift_rotation(delta, head_dim=t.head_dim or 0, theta=t.rope_theta, denominator=spec.unit)
        return Rotation(*(a.reshape(a.shape[0], 1, -1, a.shape[-1]) for a in turn))

    # Keys of closing tokens that are kept apart are turned from the start, the others by what they move
    places = words.closing[:, None] + jnp.arange(closing.stop - closing.start) * spec.unit
    word_turn, closing_turn = turning(words.delta), turning(places if state.closing else words.growth)
    move_turns = [turning(move.delta) for move in plan.moves]

    def blocks(x: Rows, turns: bool, apart: Array | None) -> list[Block]:
        """All that changes in one layer's buffer [B, K, S, H]."""

        def run(start: Slot, size: int) -> Rows:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=2), x)

        found = []
        for move, turn in zip(plan.moves, move_turns, strict=True):
            rows = run(move.source, move.size)
            found.append(move.block(x, _turned(rows, turn) if turns and turn else rows, 2))
        if size:
            said = run(words.source, size)
            found += _word_blocks(cache, x, _turned(said, word_turn) if turns and word_turn else said, words, state.words)
        if turns and closing_turn:
            close = apart if isinstance(x, Int8Rows) else x[:, :, closing]
            found.append(Block(stored_as(x, rotate(close, closing_turn)), (0, 0, closing.start)))
        return [block.placed() for block in found]

    # In recompute mode keys and values are made anew every round: what moves is the embedding
    rewritten = {"embeddings": False} if state.embeddings else {"k": True, "v": False}
    changed = {}
    for name, turns in rewritten.items():
        layers = []
        for index, x in enumerate(getattr(state, name)):
            apart = state.closing[index] if state.closing else None
            x, found = _read_first(x, functools.partial(blocks, turns=turns, apart=apart), go)
            layers.append(x := _put(x, found))
            go &= ~jnp.isinf(_corner(x))  # one buffer after the other: the blocks of all of them need not exist at once
        changed[name] = tuple(layers)
    return changed


def _fact_blocks(state: StreamState, plan: Plan, words: Words, closing: slice) -> dict[str, list[Block]]:
    """What changes of the slots' facts, besides validity where rounds leave and move."""
    cache, append, size = state.spec.cache, state.spec.stream.positions == "append", words.delta.shape[1]
    valid: list[Block] = []
    tokens: list[Block] = []
    coordinates: list[Block] = []
    if cache.spill:  # seen in the first round only
        shown = state.valid[:, cache.spill_slot : cache.spill_slot + cache.spill] & (state.age == 0)[:, None]
        valid.append(Block(shown, (0, cache.spill_slot)))
    for move in plan.moves:
        tokens.append(move.block(state.tokens, jax.lax.dynamic_slice_in_dim(state.tokens, move.source, move.size, axis=1), 1))
        u = jax.lax.dynamic_slice_in_dim(state.coordinates, move.source, move.size, axis=2)
        coordinates.append(move.block(state.coordinates, u if append else u + move.delta[:, None, None], 2))
    if size:
        said = jax.lax.dynamic_slice_in_dim(state.tokens, words.source, size, axis=1)
        u = jax.lax.dynamic_slice_in_dim(state.coordinates[:, 0], words.source, size, axis=1) + words.delta
        for places, start in ((words.sink, cache.header), (words.ring, cache.words_start)):
            at, take, fresh = slice(start, start + places.shape[1]), jnp.maximum(places, 0), places >= 0
            valid.append(Block(state.valid[:, at] | fresh, (0, start)))
            tokens.append(Block(jnp.where(fresh, jnp.take_along_axis(said, take, axis=1), state.tokens[:, at]), (0, start)))
            word_u = jnp.take_along_axis(u, take, axis=1)[:, None]
            coordinates.append(Block(jnp.where(fresh[:, None], word_u, state.coordinates[:, :, at]), (0, 0, start)))
    if not append:
        coordinates.append(Block(state.coordinates[:, :, closing] + words.growth[:, None, None], (0, 0, closing.start)))
    found = {"valid": valid, "tokens": tokens, "coordinates": coordinates}
    return {name: [block.placed() for block in blocks] for name, blocks in found.items()}
