"""A stream taken out of its row and put back, elsewhere and later, goes on as if nothing had happened."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.streaming.prompt import encode_query
from svlm_jax.streaming.rows import turned_slots
from svlm_jax.streaming.visible import visible

BASE = StreamConfig(vision_window=2, text_window=5, text_sink=4, text_sliding=6, max_new_tokens=5, query="Say.", question_capacity=16)


def clips(engine, seed: int, row: int) -> np.ndarray:
    """What the stream under test sees in round `seed`, among other streams' noise."""
    batch = small.frames(engine, 1000 + seed)
    batch[row] = np.random.default_rng(seed).integers(0, 256, batch.shape[1:], dtype=np.uint8)
    return batch


def alone(config: StreamConfig, rounds: int) -> list[list[int]]:
    engine = small.engine(config, streams=2, query_capacity=16)
    engine.open(0, seed=7)
    said = []
    for index in range(rounds):
        question = {0: "Who?"} if index == 5 else None
        said.append(engine.step(clips(engine, index, 0), {0: (index, index + 1.0)}, question).tokens()[0])
    return said


def test_a_stream_that_moves_says_what_it_says_alone():
    """It leaves its row every other round, while another stream goes on for one, two or three rounds, and returns to the other row."""
    rounds, said = 12, []
    engine = small.engine(BASE, streams=2, query_capacity=16)
    engine.open(0, seed=7)
    row = 0
    for index in range(rounds):
        question = {row: "Who?"} if index == 5 else None
        said.append(engine.step(clips(engine, index, row), {row: (index, index + 1.0)}, question).tokens()[row])
        if index % 2 == 0:
            saved = jax.tree.map(np.asarray, engine.take(row).state), engine.take(row)
            engine.close(row)
            row = 1 - row
            engine.open(1 - row, seed=index)
            for pause in range(1 + index % 3):
                engine.step(small.frames(engine, 50 + pause), {1 - row: (float(pause), pause + 1.0)})
            engine.close(1 - row)
            engine.open(1 - row)  # a stream more, so that the rounds have to be counted on
            engine.put(row, dataclasses.replace(saved[1], state=saved[0]))
            engine.close(1 - row)
    assert said == alone(BASE, rounds)


@pytest.mark.parametrize(("vision", "text"), [(3, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("rounds", [-4, 0, 1, 7, 1000])
def test_rooms_turn_and_nothing_else_does(vision, text, rounds):
    cache = small.engine(dataclasses.replace(BASE, vision_window=vision, text_window=text), layers=0).spec.cache
    order, roles = turned_slots(cache, rounds), cache.describe()
    assert sorted(order) == list(range(cache.slots))
    assert (roles.field[order] == roles.field).all() and (roles.region[order] == roles.region).all()
    for ring in (cache.text, cache.clips, cache.rounds):
        if ring is not None:
            inside = (roles.region == ring.region) & (roles.room >= 0)
            assert ((roles.room[order][inside] + rounds) % ring.rooms == roles.room[inside]).all()
    fixed = roles.room < 0
    assert (order[fixed] == np.flatnonzero(fixed)).all()


def test_an_empty_engine_takes_a_stream_bit_for_bit():
    config, split, rounds = BASE, 5, 9
    whole = small.engine(config, streams=2, query_capacity=16)
    whole.open(1, seed=7)
    for index in range(split):
        whole.step(clips(whole, index, 1), {1: (index, index + 1.0)})
    saved = whole.take(1)
    other = small.engine(config, streams=2, query_capacity=16)
    other.put(1, saved)
    for index in range(split, rounds):
        for engine in (whole, other):
            engine.step(clips(engine, index, 1), {1: (index, index + 1.0)})
    ours, theirs = whole.take(1), other.take(1)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours.state, theirs.state))
    assert ours.row == theirs.row and ours.row.age == rounds


def test_streams_have_their_own_queries():
    engine = small.engine(BASE, streams=2, query_capacity=16)
    engine.open(0)
    engine.open(1, query="Who has the ball?")
    engine.step(small.frames(engine, 0), {0: (0.0, 1.0), 1: (0.0, 1.0)})
    asked = list(encode_query(engine.tokenizer, "Who has the ball?"))
    held = [visible(engine.state, row).tokens.tolist() for row in (0, 1)]
    inside = [any(ids[i : i + len(asked)] == asked for i in range(len(ids))) for ids in held]
    assert inside == [False, True]
    with pytest.raises(UserError, match=r"the query of stream 0 has .* fit: shorten it"):
        engine.open(0, query="why " * 200)
