"""Keys and values in eight bits, from the flag to the file: the words of recorded runs, streams that move and are kept, memory that is planned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import small
from jax.sharding import AbstractMesh, PartitionSpec
from quantized_traces import agreement

from svlm_jax.api import Commentary
from svlm_jax.bench.ceilings import Ceilings
from svlm_jax.bench.floors import floors
from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import qwen2_5_vl_7b
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError
from svlm_jax.kernels.ring_attention.int8 import Int8Rows
from svlm_jax.planning.serving import PROGRAMS, arguments, stream_spec
from svlm_jax.programs import tree_bytes
from svlm_jax.serving import snapshots
from svlm_jax.serving.clocks import Moment
from svlm_jax.serving.limits import Refused
from svlm_jax.serving.sessions import Wish
from svlm_jax.sharding import state_shardings
from svlm_jax.streaming.snapshot import load_engine, save_engine
from svlm_jax.streaming.state import slot_bytes, state_shapes

BASE = StreamConfig(vision_window=2, text_window=4, text_sink=4, text_sliding=6, max_new_tokens=5, query="Say.", kv="int8")


def watch(engine, first, count, row=0):
    """What a stream says in rounds [first, first + count)."""
    return [
        engine.step(small.frames(engine, index), {row: (float(index), index + 1.0)}).tokens()[row] for index in range(first, first + count)
    ]


def test_words_of_a_recorded_run():
    """Every word before it being the recorded one; of a model with random weights, whose likeliest words lie close together."""
    trace = oracle.read_json(oracle.DATA / "streaming" / "long_text.json.gz")
    agree, count = agreement(trace, None, kv="int8", rounds=8)
    assert count > 20 and agree >= 0.9 * count


@pytest.mark.parametrize("settings", [{}, {"positions": "append"}, {"mode": "recompute"}, {"mode": "windows"}, {"mode": "full"}])
def test_every_mode_keeps_them_small(settings):
    spec = small.engine(dataclasses.replace(BASE, **settings)).spec
    calls, state = arguments(spec, jnp.float32), state_shapes(spec, 1)
    assert {type(rows) for rows in (*state.k, *state.v)} == {Int8Rows} and bool(state.closing) == (settings == {})
    for name, program in PROGRAMS.items():
        found = jax.eval_shape(program, *calls[name])
        found = found[0] if name in ("ingest", "decode") else found
        assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_a_stream_that_moves_to_another_row_and_round_goes_on():
    whole, other = (small.engine(BASE, streams=2) for _ in range(2))
    whole.open(1, seed=3)
    before = watch(whole, 0, 6, row=1)
    assert before
    saved = whole.take(1)
    other.open(0, seed=5)
    watch(other, 0, 9)
    other.put(1, saved)
    other.close(0)
    for index in range(6, 10):
        frames = small.frames(whole, index)
        ours, theirs = (engine.step(frames, {1: (float(index), index + 1.0)}).tokens()[1] for engine in (other, whole))
        assert ours == theirs


def test_files_bring_a_stream_back_bit_for_bit(tmp_path):
    """That of an evaluation, and that of a server; neither goes into an engine that keeps keys otherwise."""
    engine, again = small.engine(BASE), small.engine(BASE)
    engine.open(0)
    watch(engine, 0, 5)
    save_engine(engine, tmp_path / "engine.npz")
    load_engine(again, tmp_path / "engine.npz")
    jax.tree.map(np.testing.assert_array_equal, again.state, engine.state)
    wide = small.engine(dataclasses.replace(BASE, kv=None))
    with pytest.raises(UserError, match="other settings"):
        load_engine(wide, tmp_path / "engine.npz")
    saved = engine.take(0)
    kept = snapshots.Snapshot("strm_0123456789abcdef", Wish(), saved, {}, (), 0, Moment(0.0, 0.0, ""))
    print_ = snapshots.fingerprint(engine.spec, "weights")
    found = snapshots.decode(snapshots.encode(kept, print_), engine.spec, jnp.float32, print_)
    jax.tree.map(np.testing.assert_array_equal, found.saved.state, saved.state)
    with pytest.raises(Refused, match="other settings"):
        snapshots.decode(snapshots.encode(kept, print_), wide.spec, jnp.float32, snapshots.fingerprint(wide.spec, "weights"))
    assert watch(engine, 5, 3) == watch(again, 5, 3)


def test_memory_and_floors_are_those_of_the_smaller_cache():
    model, rates = qwen2_5_vl_7b(), Ceilings(3.0, 800.0)
    wide, narrow = (stream_spec(model, StreamConfig(kv=kv)) for kv in (None, "int8"))
    assert (slot_bytes(wide, jnp.bfloat16), slot_bytes(narrow, jnp.bfloat16)) == (57_344, 2 * 28 * 4 * (128 + 4))
    states = [state_shapes(spec, 1, jnp.bfloat16) for spec in (wide, narrow)]
    rows = [tree_bytes((state.k, state.v)) for state in states]
    assert rows == [spec.cache.slots * slot_bytes(spec, jnp.bfloat16) for spec in (wide, narrow)]
    assert tree_bytes(states[1]) < 0.55 * tree_bytes(states[0])
    least = [floors(spec, rates, streams=1, cached_tokens=47_000, dtype=jnp.bfloat16)["decode_step"] for spec in (wide, narrow)]
    assert least[0] - least[1] == pytest.approx(1e3 * 47_000 * (57_344 - 29_568) / 3e12)


def test_scales_are_cut_as_their_rows():
    shapes = state_shapes(stream_spec(qwen2_5_vl_7b(), StreamConfig(kv="int8")), 2, jnp.bfloat16)
    found = state_shardings(shapes, AbstractMesh((2, 1, 1, 4), ("data", "fsdp", "sequence", "tensor")))
    assert found.k[0].values.spec == PartitionSpec("data", "tensor", None, None)
    assert found.v[0].scale.spec == PartitionSpec("data", "tensor", None)
    assert found.closing[0].spec == PartitionSpec("data", "tensor", None, None)


def test_captions():
    said = list(Commentary(sample_path(), tiny_path(), kv="int8", duration=2, temperature=0, max_new_tokens=3))
    assert len(said) == 2 and all(one.tokens for one in said)
