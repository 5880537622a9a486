"""One round, pure: state in, state out. Two programs, `ingest` and `decode`, serve every driver.

ingest = evict, refresh (where asked for), look (vision tower), prefill the round's chunk, sample the first token.
decode = the other tokens, one step each, ended on the device when every stream has closed its turn.
`open_stream` puts one stream's system prompt and previous text into its row; the round that follows is its first.

New tokens attend to the cache before they are written (all cached is past, so validity is the whole mask) and causally to
each other. Their keys are rotated once, at the coordinate of the region they stay in; the query once for each region.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.ring_attention.api import prepare, ring_attention
from svlm_jax.kernels.ring_attention.int8 import Int8Rows, Rows, stored_as
from svlm_jax.model.layers import once, take_layer
from svlm_jax.model.qwen_vl import QwenVL, bind
from svlm_jax.model.rope import Rotation, rotate
from svlm_jax.streaming.alone import run_alone
from svlm_jax.streaming.evict import evict
from svlm_jax.streaming.layout import CacheLayout, Field, StreamSpec
from svlm_jax.streaming.refresh import refresh
from svlm_jax.streaming.sampling import sample, visible_tokens
from svlm_jax.streaming.state import Prompt, StreamState, Turn
from svlm_jax.types import Array, Bool, Float, Int, Key, Params, Slot, UInt8


class Run(NamedTuple):
    """Rows of a chunk that go to neighbouring slots, in all streams at once."""

    row: int
    rows: int
    slot: Slot
    only: Bool[Array, "B"] | None = None  # streams that are written; None: these slots are free in all of them


class Chunk(NamedTuple):
    """New tokens on their way into the cache, in the order of the sequence; a row that is not valid is a hole."""

    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    positions: Int[Array, "B T 3"]  # in units of 1/unit
    runs: tuple[Run, ...]  # where the rows go, in ROUNDS


def _append(x: Array, rows: Array, runs: Sequence[Run], axis: int = 2) -> Array:
    """Runs of rows, along `axis` of both, into x; each run is one contiguous write for all streams."""
    for row, count, slot, only in runs:
        block = jax.lax.slice_in_dim(rows, row, row + count, axis=axis).astype(x.dtype)
        if only is not None:
            block = jnp.where(only.reshape(-1, *(1,) * (x.ndim - 1)), block, jax.lax.dynamic_slice_in_dim(x, slot, count, axis))
        x = jax.lax.dynamic_update_slice_in_dim(x, block, slot, axis)
    return x


def _store(cache: Rows, rows: Float[Array, "B K T H"], runs: Sequence[Run]) -> Rows:
    """Runs of new keys or values into a layer's cache, in the form in which it keeps them."""
    return jax.tree.map(lambda x, new: _append(x, new, runs), cache, stored_as(cache, rows))


def _note(state: StreamState, chunk: Chunk, u: Int[Array, "B T 3"]) -> StreamState:
    """The facts of new tokens into their slots."""
    facts = {"tokens": chunk.tokens, "valid": chunk.valid, "coordinates": jnp.moveaxis(u, 1, 2)}
    return state.replace(**{name: _append(getattr(state, name), rows, chunk.runs, axis=rows.ndim - 1) for name, rows in facts.items()})


def _prefill(
    model: QwenVL, state: StreamState, chunk: Chunk, x: Float[Array, "B T D"], deep: Sequence[Float[Array, "B T D"]] = ()
) -> tuple[Float[Array, "B T D"], StreamState]:
    """New tokens through all layers, over the cache and themselves; their keys and values go into the chunk's runs.

    Args:
      deep: added to what the first layers put out.
    """
    spec, cache = state.spec, state.spec.cache
    # [B, R, T, 3]: a query at p meets region g as R(p + D_g) q; the chunk itself stands in the last region, ROUNDS
    rotation = spec.rotation(chunk.positions[:, None] + state.shift[:, :, None, None])
    query_turn = Rotation(*(a[..., None, :] for a in rotation))
    key_turn = Rotation(*(a[:, -1, :, None] for a in rotation))
    slots = tuple(jnp.asarray(run.slot, jnp.int32) for run in chunk.runs)
    only = tuple(run.only for run in chunk.runs)
    shape = tuple((run.row, run.rows) for run in chunk.runs)
    plan = prepare(state.valid, regions=cache.regions)
    ks, vs = list(state.k), list(state.v)
    for index in range(len(ks)):
        layer, past = take_layer(model.text.layers, index), (ks[index], vs[index], state.valid, plan)
        x, ks[index], vs[index] = _layer(layer, x, *past, query_turn, key_turn, chunk.valid, slots, only, regions=cache.regions, shape=shape)
        x = x + deep[index] if index < len(deep) else x
    return x, state.replace(k=tuple(ks), v=tuple(vs))


def _cached_layer(layer, x, k, v, valid, plan, query_turn, key_turn, fresh_valid, slots, only, *, regions, shape):
    """One layer over its cache: x [B, T, D] and the layer's k and v [B, K, S, H], with the new tokens in their runs."""
    written = []

    def attend(q, fresh_k, fresh_v):
        q = rotate(q[:, None], query_turn)
        fresh_k, fresh_v = jnp.swapaxes(rotate(fresh_k, key_turn), 1, 2), jnp.swapaxes(fresh_v, 1, 2)
        out, _ = ring_attention(q, k, v, valid, regions=regions, self_k=fresh_k, self_v=fresh_v, self_valid=fresh_valid, plan=plan)
        held = k, v
        if isinstance(k, Int8Rows):  # a TPU's compiler else copies caches as small as these, to append while they are being read
            out, held = jax.lax.optimization_barrier((out, held))
        runs = [Run(row, count, slot, streams) for (row, count), slot, streams in zip(shape, slots, only, strict=True)]
        with jax.named_scope("append"):
            written.extend(_store(cache, rows, runs) for cache, rows in zip(held, (fresh_k, fresh_v), strict=True))
        return out

    return layer(x, attend), *written


_layer = once(_cached_layer, "regions", "shape")


def _recompute(model: QwenVL, state: StreamState) -> tuple[Float[Array, "B 1 D"], StreamState]:
    """Mode "recompute": the whole visible sequence anew, with fresh keys; gives the output of its last token."""
    spec, cache = state.spec, state.spec.cache
    sizes = np.array([stop - start for start, stop in cache.regions])
    positions = state.coordinates - jnp.repeat(state.shift, sizes, axis=1, total_repeat_length=cache.slots)[:, None]
    # Contiguous positions in the order (time, row, column) are the order of the sequence; unused slots go last
    t, row, column = (jnp.where(state.valid, positions[:, axis], np.iinfo(np.int32).max) for axis in range(3))
    order = jnp.lexsort((column, row, t), axis=-1)
    place = jnp.argsort(order, axis=-1)
    x, *deep = (jnp.take_along_axis(rows[:, 0], order[..., None], axis=1) for rows in state.embeddings)
    valid = jnp.take_along_axis(state.valid, order, axis=1)

    def turn(coordinates: Int[Array, "B 3 S"]) -> Rotation:
        ordered = jnp.take_along_axis(coordinates, order[:, None], axis=2)
        return Rotation(*(a[:, :, None] for a in spec.rotation(jnp.moveaxis(ordered, 1, 2))))

    compute_turn, stored_turn = turn(positions), turn(state.coordinates)
    ks, vs = list(state.k), list(state.v)

    def keep(layer: int, k: Array, v: Array) -> None:
        for buffers, rows in ((ks, rotate(k, stored_turn)), (vs, v)):
            kept = jnp.take_along_axis(rows, place[:, :, None, None], axis=1)
            buffers[layer] = stored_as(buffers[layer], jnp.swapaxes(kept, 1, 2))

    x = run_alone(model, x, valid, compute_turn, keep, deep=deep)
    last = jnp.maximum(jnp.sum(valid, axis=1) - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1), state.replace(k=tuple(ks), v=tuple(vs))


def _chunk(state: StreamState, prompt: Prompt) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], list[Run], int]:
    """The round's tokens, which of the rows hold one, where the rows go, and the clip's first row.

    Rows are in the order of the sequence, with holes: fields of a fixed size are filled from their front.
    """
    spec, cache, p = state.spec, state.spec.cache, state.spec.prompt
    batch, budget = state.turn.shape
    ring, older = cache.rounds, state.age > 0
    last = jnp.take_along_axis(state.turn, jnp.clip(state.turn_length - 1, 0, budget - 1)[:, None], axis=1)[:, 0]
    columns: list[tuple[Field, Array, Array]] = []

    def constant(field: Field, ids: tuple[int, ...]) -> None:
        rows = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (batch, len(ids)))
        columns.append((field, rows, jnp.ones(rows.shape, jnp.bool_)))

    def filled(field: Field, ids: Array, length: Array, size: int) -> None:
        rows = jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, size - ids.shape[1])))
        columns.append((field, rows, jnp.arange(size) < length[:, None]))

    columns.append((Field.NONE, jnp.zeros((batch, cache.hole), jnp.int32), jnp.zeros((batch, cache.hole), jnp.bool_)))
    closes = jnp.broadcast_to(jnp.asarray([p.im_end, p.newline], jnp.int32), (batch, 2))
    ran_out = older & (last != p.im_end)
    columns.append(
        (Field.PENDING, jnp.concatenate([last[:, None], closes], 1), jnp.stack([ran_out, older, older], 1)),
    )
    constant(Field.HEAD, p.user_head)
    filled(Field.TIME, prompt.time, prompt.time_length, spec.time_capacity)
    if prompt.question is not None and prompt.question_length is not None:
        filled(Field.QUESTION, prompt.question, prompt.question_length, ring.question)
    columns.append((Field.CLIP, *_clip(spec, prompt, batch)))
    if prompt.query is not None and prompt.query_length is not None:
        filled(Field.QUERY, prompt.query, jnp.where(older, 0, prompt.query_length), ring.query)
    constant(Field.CLOSE, p.block_close)
    constant(Field.ASSISTANT, p.assistant_head)

    room, row, clip_row = ring.room(state.round), 0, 0
    runs: list[Run] = []
    end = None  # (row, slot) right behind the last run, which a neighbour in both prolongs
    for field, rows, _ in columns:
        offset = 0
        for other, size in ring.fields:
            if other is field:
                break
            offset += size
        apart = field in (Field.QUESTION, Field.QUERY)
        slot = ring.slot(field, room) if apart else ring.start + room * ring.stride + offset
        if end is not None and not apart and end == (row, offset):
            runs[-1] = runs[-1]._replace(rows=runs[-1].rows + rows.shape[1])
        else:
            # The query has one place, which a stream that is past its first round may still hold
            runs.append(Run(row, rows.shape[1], slot, ~older if field is Field.QUERY else None))
        end = None if apart else (row + rows.shape[1], offset + rows.shape[1])
        clip_row = row if field is Field.CLIP else clip_row
        row += rows.shape[1]
    tokens = jnp.concatenate([rows for _, rows, _ in columns], 1)
    valid = jnp.concatenate([mask for *_, mask in columns], 1) & prompt.active[:, None]
    return tokens, valid, runs, clip_row


def _clip(spec: StreamSpec, prompt: Prompt, batch: int) -> tuple[Int[Array, "B rows"], Bool[Array, "B rows"]]:
    """A clip's tokens, and which of its rows hold one: all do but for what a stamp leaves free of its place."""
    tokens = jnp.broadcast_to(jnp.asarray(spec.clip_tokens, jnp.int32), (batch, len(spec.clip_tokens)))
    valid = jnp.ones(tokens.shape, jnp.bool_)
    if prompt.stamp is not None and prompt.stamp_length is not None:
        size = spec.stamp_capacity
        for index, (first, _) in enumerate(spec.visuals):
            place = slice(first - 1 - size, first - 1)
            tokens = tokens.at[:, place].set(prompt.stamp[:, index])
            valid = valid.at[:, place].set(jnp.arange(size) < prompt.stamp_length[:, index, None])
    return tokens, valid


def _at_pads(spec: StreamSpec, x: Float[Array, "B T D"], features: Float[Array, "B C D"], clip_row: int) -> Float[Array, "B T D"]:
    """x with the clip's features in its pads' rows."""
    pieces, end, taken = [], 0, 0
    for first, stop in spec.visuals:
        count = stop - first
        pieces += [x[:, end : clip_row + first], features[:, taken : taken + count].astype(x.dtype)]
        end, taken = clip_row + stop, taken + count
    return jnp.concatenate([*pieces, x[:, end:]], axis=1)


def _positions(
    spec: StreamSpec, valid: Bool[Array, "B T"], start: Int[Array, "B"], clip_row: int | None
) -> tuple[Int[Array, "B T 3"], Int[Array, "B"]]:
    """Coordinates of a chunk's rows from `start` on, and the first one behind them. Text counts on, every visual spans its grid."""
    unit, rows = spec.unit, valid.shape[1]
    text = np.ones(rows, bool)
    pads = np.zeros((rows, 3), np.int32)
    passed = np.zeros(rows, np.int32)  # coordinates that the pads before a row take
    if clip_row is not None:
        for first, stop in spec.visuals:
            rows_of = slice(clip_row + first, clip_row + stop)
            text[rows_of], pads[rows_of] = False, spec.pad_offsets
            passed[rows_of.stop :] += spec.pads_extent
    counted = jnp.cumsum(valid & text, axis=1, dtype=jnp.int32)
    before = (counted - (valid & text)) * unit + passed
    positions = (start[:, None] + before)[..., None] + pads
    active = valid[:, -1]
    extent = counted[:, -1] * unit + passed[-1]
    return positions, start + jnp.where(active, extent, 0)


def _draw(model: QwenVL, state: StreamState, x: Float[Array, "B D"], key: Key[Array, "B"], step: Array | int, goes: Bool[Array, "B"]) -> StreamState:
    """Token `step` of the turn, for the streams that go on."""
    spec = state.spec
    budget = spec.stream.max_new_tokens
    logits = model.text.logits(x)
    token = sample(logits, state.seen, key, state.age * budget + step, spec.stream)
    rows = jnp.arange(token.shape[0])
    watched = state.watched
    if spec.watch:
        watched = watched.at[:, step].set(jnp.where(goes[:, None], logits[:, np.asarray(spec.watch)], watched[:, step]))
    seen = state.seen if spec.stream.repetition_penalty == 1.0 else state.seen.at[rows, token].max(goes)
    return state.replace(
        turn=state.turn.at[:, step].set(jnp.where(goes, token, 0)),
        turn_length=state.turn_length + goes,
        done=~goes | (token == spec.prompt.im_end),
        seen=seen,
        watched=watched,
    )


def ingest(
    params: Params, state: StreamState, frames: UInt8[Array, "B F 3 height width"], prompt: Prompt, key: Key[Array, "B"]
) -> tuple[StreamState, Int[Array, "B"]]:
    """A round up to its first token: evict, read older words anew if it is time to, look, prefill, sample.

    Args:
      params: of `state.spec.model`, one array a layer or stacked.
      state: donated.
      frames: this round's, resized to the spec's size.
      prompt: its time, and a question or the first round's query if there is one.
      key: one PRNG key a stream.

    Returns:
      The state, and the first token of each stream's turn (a copy that outlives the donated state).
    """
    spec = state.spec
    model = bind(spec.model, params)
    state = refresh(model, evict(state), prompt.active)
    tokens, valid, runs, clip_row = _chunk(state, prompt)
    positions, after = _positions(spec, valid, state.next_position, clip_row)
    with jax.named_scope("vision"):
        features = model.vision(frames)
    with jax.named_scope("prefill"):
        x = _at_pads(spec, model.text.embed(tokens), features.embedded, clip_row)
        deep = tuple(_at_pads(spec, jnp.zeros_like(x), level, clip_row) for level in features.deep)
        state = state.replace(next_position=after)
        return first_token(model, state, Chunk(tokens, valid, positions, tuple(runs)), x, key, prompt.active, deep=deep)


def first_token(
    model: QwenVL,
    state: StreamState,
    chunk: Chunk,
    x: Float[Array, "B T D"],
    key: Key[Array, "B"],
    goes: Bool[Array, "B"],
    *,
    deep: Sequence[Float[Array, "B T D"]] = (),
) -> tuple[StreamState, Int[Array, "B"]]:
    """Runs a chunk, whose last row is its last token, and samples the turn's first token in the streams that go on.

    Args:
      deep: added to what the decoder's first layers put out, a row a token.
    """
    spec = state.spec
    u = chunk.positions + state.shift[:, -1, None, None]
    if state.embeddings:
        fresh = zip(state.embeddings, (x, *deep), strict=True)
        state = state.replace(embeddings=tuple(_append(kept, rows[:, None], chunk.runs) for kept, rows in fresh))
        x, state = _recompute(model, _note(state, chunk, u))
    else:
        x, state = _prefill(model, state, chunk, x, deep)
        state = _note(state, chunk, u)
    state = state.replace(
        turn=jnp.zeros_like(state.turn),
        turn_length=jnp.zeros_like(state.turn_length),
        watched=jnp.zeros_like(state.watched),
    )
    if spec.stream.repetition_penalty != 1.0:
        state = state.replace(seen=visible_tokens(state.tokens, state.valid, spec.model.text.vocab_size))
    state = _draw(model, state, x[:, -1], key, 0, goes)
    return state, state.turn[:, 0] + 0


def _decode_step(model: QwenVL, state: StreamState, key: Key[Array, "B"], step: Int[Array, ""], room: Array) -> StreamState:
    """Runs the turn's newest token and samples the next one, in every stream whose turn is open."""
    spec, ring = state.spec, state.spec.cache.rounds
    goes = ~state.done
    token = jax.lax.dynamic_index_in_dim(state.turn, step - 1, axis=1)
    positions = jnp.broadcast_to(state.next_position[:, None, None], (*token.shape, 3))
    x = model.text.embed(token)
    chunk = Chunk(token, goes[:, None], positions, (Run(0, 1, ring.slot(Field.GENERATED, room) + step - 1),))
    if state.embeddings:
        embedding, *deep = state.embeddings  # DeepStack adds nothing to words
        state = state.replace(embeddings=(_append(embedding, x[:, None], chunk.runs), *deep))
    x, state = _prefill(model, state, chunk, x)
    state = _note(state, chunk, positions + state.shift[:, -1, None, None])
    state = state.replace(next_position=state.next_position + goes * spec.unit)
    return _draw(model, state, x[:, 0], key, step, goes)


def decode(params: Params, state: StreamState, key: Key[Array, "B"]) -> tuple[StreamState, Turn]:
    """The rest of the turn, and the end of the round. `state` is donated; `key` is the same as `ingest`'s."""
    spec = state.spec
    model = bind(spec.model, params)
    budget, room = spec.stream.max_new_tokens, spec.cache.rounds.room(state.round)
    active = state.turn_length > 0

    def goes_on(carry: tuple[Array, StreamState]) -> Array:
        step, state = carry
        return (step < budget) & ~jnp.all(state.done)

    def body(carry: tuple[Array, StreamState]) -> tuple[Array, StreamState]:
        step, state = carry
        return step + 1, _decode_step(model, state, key, step, room)

    with jax.named_scope("decode"):
        _, state = jax.lax.while_loop(goes_on, body, (jnp.ones((), jnp.int32), state))
    state = state.replace(round=state.round + 1, age=state.age + active, done=jnp.ones_like(state.done))
    cached = jnp.sum(state.valid, axis=1, dtype=jnp.int32)
    return state, Turn(state.turn + 0, state.turn_length + 0, state.watched + 0, cached)


def open_stream(params: Params, state: StreamState, row: Int[Array, ""], words: Int[Array, "W"], length: Int[Array, ""]) -> StreamState:
    """Opens a row: clears it, and runs the system prompt and the initial previous text, which nothing stands before.

    Args:
      state: donated.
      row: of the batch.
      words: token ids of the previous text, padded to `spec.cache.words_capacity`.
      length: how many of them there are.
    """
    spec, cache, p = state.spec, state.spec.cache, state.spec.prompt
    model = bind(spec.model, params)
    head, close = (*p.system, *p.previous_text_head), p.block_close
    tokens = jnp.concatenate([jnp.asarray(head, jnp.int32), words.astype(jnp.int32), jnp.asarray(close, jnp.int32)])[None]
    index = np.arange(tokens.shape[1]) - cache.header
    valid = ((index < length) | (index >= cache.words_capacity))[None]
    positions, after = _positions(spec, valid, jnp.zeros((1,), jnp.int32), None)
    source = _header_rows(cache, length)
    filled = source >= 0
    place = jnp.maximum(source, 0)
    slots = source.shape[0]

    def write(x: Array, rows: Array, axis: int) -> Array:
        """Rows [1, ..., T, ...] of the header to the first slots of one row of x."""
        return write_row(x, jnp.take(rows, place, axis=axis))

    def write_row(x: Array, block: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, block.astype(x.dtype), (row, *([0] * (x.ndim - 1))))

    with jax.named_scope("open_stream"):
        x = model.text.embed(tokens)
        embeddings = (*(write(e, x[:, None], 2) for e in state.embeddings[:1]), *state.embeddings[1:])
        turn = Rotation(*(a[:, :, None] for a in spec.rotation(positions)))
        ks, vs, closing = list(state.k), list(state.v), list(state.closing)

        def keep(layer: int, k: Array, v: Array) -> None:
            if closing:
                closing[layer] = write_row(closing[layer], jnp.swapaxes(k[:, -len(close) :], 1, 2))
            for buffers, rows in ((ks, rotate(k, turn)), (vs, v)):
                fresh = stored_as(buffers[layer], jnp.swapaxes(rows, 1, 2))
                buffers[layer] = jax.tree.map(lambda old, new: write(old, new, 2), buffers[layer], fresh)

        run_alone(model, x, valid, turn, keep)
    coordinates = jnp.moveaxis(positions, 1, 2)
    cleared = jnp.zeros((1, cache.slots - slots), jnp.bool_)
    shift = jnp.zeros((1, len(cache.regions)), jnp.int32)

    def put(name: str, value: Array) -> Array:
        old = getattr(state, name)
        value = jnp.broadcast_to(jnp.asarray(value, old.dtype), (1, *old.shape[1:]))
        return jax.lax.dynamic_update_slice(old, value, (row, *([0] * (old.ndim - 1))))

    return state.replace(
        k=tuple(ks),
        v=tuple(vs),
        closing=tuple(closing),
        embeddings=embeddings,
        valid=put("valid", jnp.concatenate([filled[None], cleared], 1)),
        tokens=write(state.tokens, tokens, 1),
        coordinates=write(state.coordinates, coordinates, 2),
        shift=put("shift", shift),
        next_position=put("next_position", after),
        words=put("words", length),
        age=put("age", 0),
        turn_length=put("turn_length", 0),
        done=put("done", True),
    )


def close_stream(state: StreamState, row: Int[Array, ""]) -> StreamState:
    """Empties a row: nothing of its stream is left to attend to. `state` is donated."""
    keep = jnp.arange(state.age.shape[0]) != row
    return state.replace(valid=state.valid & keep[:, None], age=state.age * keep, turn_length=state.turn_length * keep, done=state.done | ~keep)


def _header_rows(cache: CacheLayout, length: Int[Array, ""]) -> Int[Array, "slots"]:
    """For every slot of SINK and WORDS, the row of the opening chunk that it takes; -1: none.

    Word n goes to the sink while n < sink, the last `ring` words to the ring at (n - sink) mod ring, and what lies between
    (an initial text longer than both) to the spill, for the first round only.
    """
    static = np.full(cache.regions[cache.words_region][1], -1, np.int32)
    static[: cache.header] = np.arange(cache.header)
    close = cache.header + cache.words_capacity
    static[cache.closing_slot : cache.spill_slot] = np.arange(close, close + cache.spill_slot - cache.closing_slot)
    rows: Array = jnp.asarray(static)

    def put(start: int, word: Array, fits: Array) -> None:
        nonlocal rows
        rows = rows.at[start : start + word.shape[0]].set(jnp.where(fits & (word < length) & (word >= 0), cache.header + word, -1))

    put(cache.header, jnp.arange(cache.sink), jnp.asarray(True))
    ring_first = jnp.maximum(length - cache.ring, cache.sink)  # the first word that the ring holds
    if cache.spill:
        word = cache.sink + jnp.arange(cache.spill)
        put(cache.spill_slot, word, word < ring_first)
    if cache.ring:
        last = length - 1
        word = last - jnp.mod(last - cache.sink - jnp.arange(cache.ring), cache.ring)
        put(cache.words_start, word, word >= ring_first)
    return rows


# For GPUs, ignored by other compilers. A command buffer (CUDA graph) is made anew when one of its arguments lies elsewhere, as every round's
# frames do: 13 ms a round on an H100, so the kernels of `ingest` are launched one by one. The loop of `decode` is one graph, its end included:
# the host would else look at every step whether all turns are closed.
INGEST_OPTIONS = {"xla_gpu_graph_min_graph_size": 1 << 20}
DECODE_OPTIONS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"}

compiled: dict[str, Callable] = {
    "ingest": jax.jit(ingest, donate_argnames="state", compiler_options=INGEST_OPTIONS),
    "decode": jax.jit(decode, donate_argnames="state", compiler_options=DECODE_OPTIONS),
    "evict": jax.jit(evict, donate_argnames="state"),
    "open_stream": jax.jit(open_stream, donate_argnames="state"),
    "close_stream": jax.jit(close_stream, donate_argnames="state"),
}
