"""Older words that are read anew (`text_refresh`) are what the previous text is where nothing was seen yet, and no other stream's."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small

from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.kernels.ring_attention.int8 import widen
from svlm_jax.model.rope import Rotation, rotate
from svlm_jax.streaming.engine import Engine
from svlm_jax.streaming.visible import visible

BASE = StreamConfig(
    vision_window=2, text_window=3, text_sink=3, text_sliding=9, max_new_tokens=6, previous_text="Kick-off.", temperature=1.5, text_refresh=5
)


def run(engine: Engine, rounds: int) -> None:
    """That many rounds, and one more up to its first token."""
    engine.open(0)
    for index in range(rounds):
        engine.step(small.frames(engine, index), {0: (index, index + 1.0)})
    engine.ingest(small.frames(engine, rounds), engine.prompt({0: (rounds, rounds + 1.0)}))


def previous_text(engine: Engine) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Tokens of the system prompt and the previous text, and of every layer their keys, turned back to position 0, and values [T, K, H]."""
    seen, spec = visible(engine.state), engine.spec
    slots = seen.slots[seen.slots < spec.cache.regions[spec.cache.words_region][1]]
    u = jnp.moveaxis(engine.state.coordinates[0][:, slots], 0, 1)
    back = Rotation(*(a[:, None] for a in spec.rotation(u)))
    back = Rotation(back[0], -back[1])
    rows = [[jnp.swapaxes(widen(x, jnp.float32)[0][:, slots], 0, 1) for x in layers] for layers in (engine.state.k, engine.state.v)]
    return seen.tokens[: len(slots)].tolist(), [np.asarray(rotate(k, back)) for k in rows[0]], [np.asarray(v) for v in rows[1]]


@pytest.mark.parametrize(("vision", "text"), [(3, 3), (2, 4), (4, 2)])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_words_read_anew_are_those_of_a_stream_that_opens_with_them(vision, text, kv):
    config = dataclasses.replace(BASE, vision_window=vision, text_window=text, kv=kv)
    anew, never = (small.engine(dataclasses.replace(config, text_refresh=rounds), layers=2) for rounds in (10, 0))
    for engine in (anew, never):
        run(engine, 10)  # it is time to in the last one, for the first time
    tokens, keys, values = previous_text(anew)
    cache, close = anew.spec.cache, len(anew.spec.prompt.block_close)
    words = tokens[cache.header : -close]
    assert len(words) == cache.sink + cache.ring, "the ring is full and has turned"
    fresh = small.engine(dataclasses.replace(config, text_refresh=0), layers=2)
    fresh.open(0, words=words)
    opened, fresh_keys, fresh_values = previous_text(fresh)
    assert opened == tokens
    # In eight bits a row is off by half a step, 1/254 of its largest number, on both sides
    for ours, theirs in zip((*keys, *values), (*fresh_keys, *fresh_values), strict=True):
        step = np.abs(theirs).max(-1, keepdims=True) / 254 if kv else 0.0
        assert (np.abs(ours - theirs) <= 4 * step + 2e-5).all()
    if anew.state.closing:
        for ours, theirs in zip(anew.state.closing, fresh.state.closing, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    kept, _, old_values = previous_text(never)
    assert kept == tokens  # both have said the same so far: only what they make of it differs
    assert np.abs(old_values[1] - fresh_values[1]).max() > 0.05


def test_only_streams_whose_round_it_is_are_read_anew():
    """Two streams of different ages, in the round of one of them: the other's slots stay as they are, bit for bit."""
    engine = small.engine(dataclasses.replace(BASE, text_window=2, previous_text=""), streams=2, layers=2)
    engine.open(0)
    engine.open(1)
    for index in range(4):
        engine.step(small.frames(engine, index), {row: (index, index + 1.0) for row in (0, 1)})
    engine.close(1)
    engine.open(1)
    engine.step(small.frames(engine, 4), {row: (4.0, 5.0) for row in (0, 1)})
    cache = engine.spec.cache
    sink = slice(0, cache.closing_slot)  # nothing in it moves any more in a stream that is older than its window
    before = [np.asarray(v[:, :, sink]) for v in engine.state.v]
    full = np.asarray(engine.state.valid[:, sink])
    engine.ingest(small.frames(engine, 5), engine.prompt({row: (5.0, 6.0) for row in (0, 1)}))
    changed = [np.abs(np.asarray(v[:, :, sink]) - old).max(axis=(1, 3)) * full for v, old in zip(engine.state.v, before, strict=True)]
    assert max(rows[1].max() for rows in changed) == 0.0  # of age 1
    assert changed[1][0, cache.header :].max() > 1e-3  # of age 5: its first words were said among pictures


def test_other_modes_have_nothing_to_read_anew_and_a_negative_number_is_refused():
    for mode in ("full", "windows", "recompute"):
        ours, theirs = (small.engine(dataclasses.replace(BASE, mode=mode, text_refresh=rounds, text_window=2)) for rounds in (1, 0))
        for engine in (ours, theirs):
            run(engine, 5)
        assert (visible(ours.state).tokens == visible(theirs.state).tokens).all()
    with pytest.raises(UserError, match="--text-refresh must not be negative, but is -1"):
        StreamConfig(text_refresh=-1)
