"""The engine against the contract at random settings, and what every driver and batch must leave unchanged."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import replay_trace
import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.kernels.ring_attention.int8 import widen
from svlm_jax.model.layers import rms_norm
from svlm_jax.model.rope import mrope_rotation, rotate, rotation_table
from svlm_jax.streaming.engine import Engine, scan_compiled
from svlm_jax.streaming.layout import Field
from svlm_jax.streaming.prompt import encode_query, encode_time, encode_words
from svlm_jax.streaming.state import Prompt, init_state
from svlm_jax.streaming.step import compiled, decode, ingest
from svlm_jax.streaming.visible import visible

BASE = StreamConfig(
    vision_window=2,
    text_window=3,
    text_sink=3,
    text_sliding=6,
    max_new_tokens=5,
    temperature=1.5,
    query="Who has the ball?",
    previous_text="Kick-off.",
    question_capacity=12,
)


def prompt_ids(engine: Engine, time: tuple[float, float], *, first: bool, words: str = "", question: str = "") -> list[int]:
    """What a round appends to the sequence besides its pending tokens."""
    p, spec, tokens = engine.spec.prompt, engine.spec, engine.tokenizer
    ids: list[int] = []
    if first:
        ids += [*p.system, *p.previous_text_head, *encode_words(tokens, words), *p.block_close]
    ids += [*p.user_head, *encode_time(tokens, *time), *encode_query(tokens, question), *small.clip_ids(engine, time[0])]
    ids += encode_query(tokens, spec.stream.query) if first else ()
    return [*ids, *p.block_close, *p.assistant_head]


def expect_contract(engine: Engine, rounds: int, *, row: int = 0, words: str = "", start: float = 0.0, questions: dict[int, str] | None = None) -> None:
    """Runs one stream and compares survivors, sizes and positions with the contract in every round."""
    contract, seconds = small.contract(engine), engine.spec.stream.chunk_seconds
    append = engine.spec.stream.positions == "append"
    offset = 0
    engine.open(row, previous_text=words, seed=row)
    for index in range(rounds):
        time = (start + index * seconds, start + (index + 1) * seconds)
        question = (questions or {}).get(index, "")
        if index:
            contract.evict()
        held = contract.cached
        contract.append_round(
            ([engine.spec.prompt.newline] if index else []) + prompt_ids(engine, time, first=not index, words=words, question=question)
        )
        engine.ingest(small.frames(engine, index), engine.prompt({row: time}, {row: question} if question else None))
        seen = visible(engine.state, row)
        assert seen.tokens.tolist() == contract.ids, f"round {index}"
        if append:
            fresh = contract.positions(contract.ids[held:])
            np.testing.assert_allclose(seen.positions[:, held:], np.array(fresh, float) + offset, atol=1e-9)
        else:
            np.testing.assert_allclose(seen.positions, np.array(contract.positions(), float), atol=1e-9, err_msg=f"round {index}")
        last = seen.positions[0, -1]
        turn = engine.decode()
        tokens = np.asarray(turn.tokens)[row, : int(turn.length[row])].tolist()
        contract.close_turn(tokens)
        offset = last + len(tokens)
        assert int(turn.cached[row]) == contract.cached


@st.composite
def configs(draw):
    vision, text = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    fps = draw(st.sampled_from([1.0, 2.0, 3.0, 8.0]))
    sink, sliding = draw(st.sampled_from([(0, 1), (3, 1), (0, 4), (5, 2), (2, 9), (None, None)]))
    return dataclasses.replace(
        BASE,
        vision_window=vision,
        text_window=text,
        text_sink=sink,
        text_sliding=sliding,
        fps=fps,
        max_new_tokens=draw(st.integers(1, 6)),
        positions=draw(st.sampled_from(["contiguous", "contiguous", "append"])),
        question_capacity=draw(st.sampled_from([0, 12])),
        previous_text=draw(st.sampled_from(["", "A goal!", "one two three four five six seven eight nine ten " * 2])),
        text_capacity=200,
    )


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configs(), st.integers(0, 10**6))
def test_survivors_and_positions_follow_the_contract(config, start):
    """Random windows, texts, rates and turns, with no layers: only the bookkeeping is at stake."""
    engine = small.engine(config, layers=0, rows=random.Random(start).randint(1, 3), columns=2)
    questions = {3: "Who scored?", 7: "What is the score?"} if config.question_capacity else {}
    expect_contract(engine, 2 * max(config.vision_window, config.text_window) + 5, words=config.previous_text, start=float(start), questions=questions)


@pytest.mark.parametrize(
    ("vision", "text", "changes"),
    [(2, 2, {"fps": 1.0, "positions": "append"}), (1, 3, {"fps": 3.0}), (3, 2, {"fps": 4.0, "question_capacity": 0})],
)
def test_stamped_clips_follow_the_contract(vision, text, changes):
    """Stamps grow with the time, and leave with their clip; one, two odd and two even pairs of frames a round."""
    engine = small.engine(dataclasses.replace(BASE, vision_window=vision, text_window=text, **changes), layers=0, family="qwen3_vl")
    questions = {3: "Who scored?"} if engine.spec.stream.question_capacity else {}
    expect_contract(engine, 9, start=95.0, words="A goal!", questions=questions)


@pytest.mark.parametrize(
    ("vision", "text", "kv"), [(3, 3, None), (2, 4, None), (1, 2, None), (4, 2, None), (3, 3, "int8"), (2, 4, "int8"), (4, 2, "int8")]
)
def test_stored_keys_are_rotated_where_they_stand(vision, text, kv):
    """In the first layer a text token's key depends on its id and coordinate alone: moved keys must equal fresh ones.

    In eight bits a row is off by at most half a step, 1/254 of its largest number, for every time it was rounded: values once, and so
    the keys of the closing tokens, which every round turns; other keys once more for every move.
    """
    words = "A goal. A save. A foul. A pass. A shot."
    engine = small.engine(dataclasses.replace(BASE, vision_window=vision, text_window=text, fps=8.0, previous_text=words, kv=kv))
    engine.open(0)
    for index in range(14):
        engine.step(small.frames(engine, index), {0: (index, index + 1)})
    spec, state, params = engine.spec, engine.state, engine.params["text"]
    c, layer = spec.model.text, params["layers"][0]
    text_slots = np.flatnonzero(np.asarray(state.valid[0]) & ~np.isin(np.asarray(state.tokens[0]), [spec.prompt.video_pad]))
    kinds = {Field(field) for field in spec.cache.describe().field[text_slots]}
    assert {Field.HEADER, Field.SINK_WORD, Field.RING_WORD, Field.CLOSING, Field.HEAD, Field.GENERATED} <= kinds
    x = rms_norm(params["embedding"][state.tokens[0, text_slots]], layer["attention_norm"], c.rms_norm_eps)
    key = jnp.einsum("td,dkh->tkh", x, layer["qkv"][:, :, -2]) + layer["qkv_bias"][:, -2]
    u = jnp.moveaxis(state.coordinates[0][:, text_slots], 0, 1)
    cos, sin = mrope_rotation(u, axes=c.mrope_axes, theta=c.rope_theta, denominator=spec.unit)
    fresh = rotate(key, type(mrope_rotation(u, axes=c.mrope_axes, theta=c.rope_theta, denominator=1))(cos[:, None], sin[:, None]))
    closing = (spec.cache.describe().field[text_slots] == Field.CLOSING)[:, None, None]

    def expect_near(rows, true, roundings):
        found = jnp.swapaxes(widen(rows, jnp.float32)[0][:, text_slots], 0, 1)
        step = 1.01 * jnp.max(jnp.abs(true), axis=-1, keepdims=True) / 254 if kv else 0.0
        assert bool((jnp.abs(found - true) <= roundings * step + 2e-5).all())

    # A rounding that is then turned may come to lie in one number: it grows by up to a half; the last one is not turned
    expect_near(state.k[0], fresh, np.where(closing, 1, 1 + 1.5 * (1 + (vision != text))))
    value = jnp.einsum("td,dkh->tkh", x, layer["qkv"][:, :, -1]) + layer["qkv_bias"][:, -1]
    expect_near(state.v[0], value, 1)


def test_streams_of_one_batch_that_join_at_different_rounds_equal_their_traces():
    """Three recorded streams, opened one after the other in one batch, each token for token as alone."""
    names, joins, rounds = ("equal_windows", "late_start", "empty_previous"), (0, 3, 5), 16
    traces = [oracle.read_json(oracle.DATA / "streaming" / f"{name}.json.gz") for name in names]
    engine = replay_trace.make_engine(traces[0], streams=3)
    produced = [[] for _ in names]
    for tick in range(max(joins) + rounds):
        live = [row for row, join in enumerate(joins) if join <= tick < join + rounds]
        for row, trace in enumerate(traces):
            if joins[row] == tick:
                engine.open(row, previous_text=trace["case"]["previous_text"])
            if joins[row] + rounds == tick:
                engine.close(row)
        batch = np.zeros((3, 2, 3, 84, 140), np.uint8)
        for row in live:
            batch[row] = replay_trace.frames(traces[row]["case"], tick - joins[row])
        times = {row: replay_trace.times(traces[row]["case"], tick - joins[row]) for row in live}
        engine.ingest(batch, engine.prompt(times))
        records = {row: replay_trace.read_sequence(engine, row) for row in live}
        turn = engine.decode()
        for row, record in records.items():
            length = int(turn.length[row])
            record["generated"] = np.asarray(turn.tokens)[row, :length].tolist()
            record["logits_cand"] = np.asarray(turn.watched)[row, :length].tolist()
            record["kv_len_out"] = int(turn.cached[row])
            produced[row].append(record)
    for ours, trace in zip(produced, traces, strict=True):
        replay_trace.compare(ours, trace["rounds"][:rounds])


def stack(prompts: list[Prompt]) -> Prompt:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *prompts)


@pytest.mark.parametrize(("mode", "text_refresh"), [("streaming", 0), ("streaming", 3), ("recompute", 0)])
def test_scan_equals_the_live_driver(mode, text_refresh):
    config, rounds = dataclasses.replace(BASE, mode=mode, text_refresh=text_refresh), 9
    live = small.engine(config, streams=2)
    scanned = small.engine(config, streams=2)
    for engine in (live, scanned):
        engine.open(0, seed=1)
        engine.open(1, previous_text="", seed=2)
    said = [live.step(small.frames(live, i), {0: (i, i + 1), 1: (i + 7, i + 8)}) for i in range(rounds)]
    first = scanned.step(small.frames(scanned, 0), {0: (0, 1), 1: (7, 8)})
    prompts = [scanned.prompt({0: (i, i + 1), 1: (i + 7, i + 8)}) for i in range(1, rounds)]
    clips = np.stack([small.frames(scanned, i) for i in range(1, rounds)])
    state, turns = scan_compiled(scanned.params, scanned.state, clips, stack(prompts), scanned._key)
    assert first.tokens() == said[0].tokens()
    for index, live_round in enumerate(said[1:]):
        for row, tokens in live_round.tokens().items():
            assert np.asarray(turns.tokens)[index, row, : turns.length[index, row]].tolist() == tokens
    for ours, theirs in zip(jax.tree.leaves(live.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("text_refresh", [0, 3])
def test_neighbours_change_nothing(text_refresh):
    """A stream says the same alone and in a batch, in any row, whatever the others do."""
    config = dataclasses.replace(BASE, text_refresh=text_refresh)
    alone = small.engine(config)
    alone.open(0, seed=5)
    batch = small.engine(config, streams=3)
    batch.open(1, previous_text="A goal.", seed=8)
    batch.step(small.frames(batch, 99), {1: (40, 41)})
    batch.open(2, seed=5)
    for index in range(10):
        clip = small.frames(alone, index)
        noise = small.frames(batch, 1000 + index)
        noise[2] = clip[0]
        if index == 4:
            batch.close(1)
        rows = {row: (float(index), index + 1.0) for row in batch.open_rows}
        ours, theirs = alone.step(clip, {0: (index, index + 1)}), batch.step(noise, rows)
        assert ours.tokens()[0] == theirs.tokens()[2], f"round {index}"


@pytest.mark.parametrize("family", small.FAMILIES)
def test_nothing_evicted_equals_one_plain_causal_forward(family):
    """Contiguous positions, a round that is only prompt: its first logits are those of the plain forward."""
    from svlm_jax.model.qwen_vl import forward

    watch = tuple(range(0, 1024, 7))
    engine = small.engine(dataclasses.replace(BASE, vision_window=9, text_window=9), layers=3, depth=2, watch=watch, family=family)
    engine.open(0)
    clips = []
    for index in range(4):
        clips.append(small.frames(engine, index))
        engine.ingest(clips[-1], engine.prompt({0: (index, index + 1)}))
        seen, turn = visible(engine.state), engine.decode()
        positions = np.round(seen.positions.T * engine.spec.unit).astype(np.int32)[None]
        places = np.flatnonzero(seen.tokens == engine.spec.prompt.video_pad)[None]
        logits = forward(engine.params, engine.spec.model, seen.tokens[None], positions, visuals=clips, places=places, denominator=engine.spec.unit)
        np.testing.assert_allclose(np.asarray(turn.watched)[0, 0], np.asarray(logits)[0, -1, list(watch)], atol=1e-4)


def test_a_recomputed_sequence_has_its_deep_features_again():
    """Mode "recompute" after evictions: the plain forward over what is visible, DeepStack's features at the clips that are left."""
    from svlm_jax.model.qwen_vl import forward

    watch, rounds = tuple(range(0, 1024, 7)), 5
    engine = small.engine(dataclasses.replace(BASE, mode="recompute"), layers=3, depth=3, watch=watch, family="qwen3_vl")
    assert len(engine.spec.model.vision.deepstack_blocks) == 2
    engine.open(0)
    clips = [small.frames(engine, index) for index in range(rounds)]
    for index, clip in enumerate(clips):
        engine.ingest(clip, engine.prompt({0: (index, index + 1)}))
        seen, turn = visible(engine.state), engine.decode()
    positions, places = seen.positions.T.astype(np.int32)[None], np.flatnonzero(seen.tokens == engine.spec.prompt.video_pad)[None]
    logits = forward(engine.params, engine.spec.model, seen.tokens[None], positions, visuals=clips[-2:], places=places)
    np.testing.assert_allclose(np.asarray(turn.watched)[0, 0], np.asarray(logits)[0, -1, list(watch)], atol=1e-4)


@pytest.mark.parametrize("text_refresh", [0, 3])
def test_no_program_is_compiled_after_the_first_rounds(text_refresh):
    engine = small.engine(dataclasses.replace(BASE, text_refresh=text_refresh), streams=2)
    names = ("ingest", "decode", "open_stream", "close_stream")
    for index in range(14):
        if index in (0, 4):
            engine.open(index // 4)
        if index == 8:
            engine.close(0)
        if index == 9:
            engine.open(0, previous_text="Anew.")
        if index == 10:
            before = {name: compiled[name]._cache_size() for name in names}
        questions = {1: "Who?"} if index == 12 else None  # the first one
        times = {row: (float(index), index + 1.0) for row in engine.open_rows}
        engine.step(small.frames(engine, index), times, questions)
    assert {name: compiled[name]._cache_size() for name in names} == before


def test_state_keeps_shape_and_type():
    engine = small.engine(BASE, streams=2)
    engine.open(0)
    prompt, clip = engine.prompt({0: (0.0, 1.0)}), small.frames(engine, 0)

    def round(params, state, clip, prompt, key):
        state, _ = ingest(params, state, clip, prompt, key)
        return decode(params, state, key)[0]

    shapes = jax.eval_shape(lambda: init_state(engine.spec, 2))
    assert jax.eval_shape(round, engine.params, shapes, clip, prompt, engine._key) == shapes


def test_turns_end_early_and_late_alike():
    """A closed turn leaves the loop; a cut one is closed before the next round. Both kinds occur here."""
    engine = small.engine(dataclasses.replace(BASE, temperature=3.0))
    engine.open(0)
    lengths = set()
    for index in range(40):
        tokens = engine.step(small.frames(engine, index), {0: (index, index + 1)}).tokens()[0]
        closed = tokens[-1] == engine.spec.prompt.im_end
        assert closed or len(tokens) == BASE.max_new_tokens
        assert engine.spec.prompt.im_end not in tokens[:-1]
        lengths.add(len(tokens) if closed else None)
    assert None in lengths


def test_windows_start_anew_with_the_words_so_far():
    engine = small.engine(dataclasses.replace(BASE, mode="windows", vision_window=3, text_window=3))
    engine.open(0)
    memory = list(encode_words(engine.tokenizer, BASE.previous_text))
    for index in range(10):
        if index and index % 3 == 0:
            kept = memory[:] if len(memory) <= 8 else memory[:3] + memory[-5:]
            memory = kept[:]
        round = engine.step(small.frames(engine, index), {0: (index, index + 1)})
        tokens = round.tokens()
        engine.note(tokens)
        memory += tokens[0][:-2] if tokens[0][-1] == engine.spec.prompt.im_end else tokens[0][:-1]
        if index in (3, 6, 9):
            held = visible(engine.state)
            fields = engine.spec.cache.describe().field[held.slots]
            assert held.tokens[np.isin(fields, [Field.SINK_WORD, Field.SPILL, Field.RING_WORD])].tolist() == kept
            assert np.sum(held.tokens == engine.spec.prompt.vision_start) == 1


def test_full_ends_at_its_capacity_with_a_clear_error():
    engine = small.engine(dataclasses.replace(BASE, mode="full", capacity_rounds=3))
    engine.open(0)
    for index in range(3):
        engine.step(small.frames(engine, index), {0: (index, index + 1)})
    assert np.sum(visible(engine.state).tokens == engine.spec.prompt.vision_start) == 3
    with pytest.raises(UserError, match="holds 3 rounds"):
        engine.step(small.frames(engine, 3), {0: (3, 4)})


def test_words_without_bound_end_at_their_capacity_with_a_clear_error():
    engine = small.engine(dataclasses.replace(BASE, text_sink=None, text_sliding=None, text_capacity=12))
    engine.open(0)
    turns: list[int] = []  # words that each turn leaves
    end = engine.spec.prompt.im_end
    with pytest.raises(UserError, match="outgrown its 12 tokens"):
        for index in range(60):
            tokens = engine.step(small.frames(engine, index), {0: (index, index + 1)}).tokens()
            turns.append(max(len(tokens[0]) - 1 - (tokens[0][-1] == end), 0))
            engine.note(tokens)
    first = len(encode_words(engine.tokenizer, BASE.previous_text))
    joined = [first + sum(turns[: max(0, round + 1 - BASE.text_window)]) for round in range(len(turns) + 1)]
    assert joined[-2] <= 12 < joined[-1]  # not before the words that leave their round do not fit


def test_a_stream_without_room_for_questions_says_so():
    engine = small.engine(dataclasses.replace(BASE, question_capacity=0))
    engine.open(0)
    with pytest.raises(UserError, match="no room for questions"):
        engine.prompt({0: (0.0, 1.0)}, {0: "Who?"})


@pytest.mark.parametrize(
    ("row_settings", "question", "message"),
    [({"previous_text": "word " * 400}, None, "previous text has"), ({}, "why " * 200, "question of stream 0")],
)
def test_what_does_not_fit_is_named(row_settings, question, message):
    engine = small.engine(BASE)
    with pytest.raises(UserError, match=message):
        engine.open(0, **row_settings)
        engine.prompt({0: (0.0, 1.0)}, {0: question})


@pytest.mark.parametrize("coordinate", [0, 1, 255, 256, 10**6, 10**6 + 12_345, 10**9, -1, -777])
@pytest.mark.parametrize("denominator", [1, 2])
def test_rotations_are_exact_at_any_coordinate(coordinate, denominator):
    cos, sin = mrope_rotation(jnp.full((1, 3), coordinate, jnp.int32), axes=(0,) * 16 + (1,) * 24 + (2,) * 24, theta=1e6, denominator=denominator)
    angle = coordinate / denominator * 1e6 ** (-np.arange(64) / 64)
    assert np.abs(np.asarray(cos[0], np.float64) - np.cos(angle)).max() < 1e-6
    assert np.abs(np.asarray(sin[0], np.float64) - np.sin(angle)).max() < 1e-6
    assert rotation_table(128, 1e6, denominator).dtype == np.float32
