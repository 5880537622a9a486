"""Serving on a mesh: streams over `data`, heads over `tensor`. What is said does not depend on how many devices say it."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from devices import on_four_devices
from jax.sharding import AbstractMesh

from svlm_jax.checkpoints.load import on_mesh
from svlm_jax.cli import main
from svlm_jax.configs.models import qwen2_5_vl_3b, qwen2_5_vl_7b, qwen2_5_vl_72b
from svlm_jax.errors import UserError
from svlm_jax.model.heads import PARTS, repeat_weight, repeated, repeats
from svlm_jax.model.qwen_vl import abstract_params, forward, init_params
from svlm_jax.sharding import MESH_AXES
from svlm_jax.streaming.placed import check_streams


def abstract_mesh(**sizes: int):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


# Key-value heads


@pytest.mark.parametrize(("heads", "shards"), [(4, 4), (10, 4)], ids=str)
def test_repeated_heads_say_the_same(heads, shards):
    """Of two key-value heads; five queries of a head do not deal out evenly."""
    sizes, _ = small.model(layers=1)
    config = dataclasses.replace(sizes, text=dataclasses.replace(sizes.text, num_attention_heads=heads))
    params = init_params(config, jax.random.key(3))
    times = repeats(config, shards)
    more = repeated(config, times)
    assert more.text.num_key_value_heads == shards and more.text.head_dim == config.text.head_dim
    layers = params["text"]["layers"]
    wide = {
        index: {name: repeat_weight(name, leaf, times) if name in PARTS else leaf for name, leaf in layer.items()}
        for index, layer in layers.items()
    }
    spread = {**params, "text": {**params["text"], "layers": wide}}
    expected = jax.tree.map(lambda leaf: leaf.shape, abstract_params(more))
    assert jax.tree.map(lambda leaf: leaf.shape, spread) == expected
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.text.vocab_size)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32)[None, :, None], (2, 9, 3))
    one, other = (np.asarray(jax.jit(forward, static_argnums=1)(p, c, tokens, positions)) for p, c in ((params, config), (spread, more)))
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_heads_of_the_published_models():
    heads = {
        name: [on_mesh(make(), abstract_mesh(tensor=n)).text.num_key_value_heads for n in (1, 2, 4, 8)]
        for name, make in (("3b", qwen2_5_vl_3b), ("7b", qwen2_5_vl_7b), ("72b", qwen2_5_vl_72b))
    }
    assert heads == {"3b": [2, 2, 4, 8], "7b": [4, 4, 4, 8], "72b": [8, 8, 8, 8]}


def test_meshes_that_cannot_be():
    with pytest.raises(UserError, match=r"tensor = 3 does not go with the 4 key-value heads of .*7b: choose a number that divides 4, or a multiple"):
        on_mesh(qwen2_5_vl_7b(), abstract_mesh(tensor=3))
    with pytest.raises(UserError, match=r"tensor = 32 is more than the 28 attention heads"):
        on_mesh(qwen2_5_vl_7b(), abstract_mesh(tensor=32))
    with pytest.raises(UserError, match=r"3 streams do not divide by data = 2: make --streams a multiple of 2"):
        check_streams(abstract_mesh(data=2, tensor=2), 3)
    check_streams(None, 3)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["caption", "--mesh", "fsdp=2"], 2, "'fsdp=2' must name data, tensor or both"),
        (["caption", "--mesh", "data=2,data=2"], 2, "must name data, tensor or both, once each"),
        (["caption", "--mesh", "data=0"], 2, "data must be a number of devices, at least 1"),
        (["serve", "--mesh", "data=2", "--streams", "3"], 2, "--streams 3 does not divide by data=2 of --mesh: make it a multiple of 2"),
        (["caption", "--mesh", "data=64,tensor=64"], 1, "needs 4096 devices"),
    ],
)
def test_a_bad_mesh_is_told_in_a_line(words, code, text, capsys):
    try:
        found = main(words)
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert text in capsys.readouterr().err


# Four devices


FOUR = """
import contextlib, sys
import jax, numpy as np
import small
from svlm_jax.api import Commentary
from svlm_jax.bench.report import Compilations
from svlm_jax.config import StreamConfig
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.model.heads import PARTS, repeat_weight, repeated, repeats
from svlm_jax.planning.hlo import collectives
from svlm_jax.programs import Programs
from svlm_jax.sharding import make_mesh, param_shardings
from svlm_jax.streaming.engine import Engine, make_spec

BATCH = StreamConfig(
    max_new_tokens=3, vision_window=2, text_window=2, text_sink=8, text_sliding=8, text_refresh=2, query="", question_capacity=0
)


def captions(data, tensor):
    mesh = make_mesh(data=data, tensor=tensor)
    settings = {"max_new_tokens": 6, "max_pixels": 56 * 84, "vision_window": 2, "text_window": 2, "query": ""}
    said = list(Commentary(sample_path(), tiny_path(), dtype="float32", mesh=mesh, duration=4, **settings))
    assert len(said) == 4
    return [(one.caption.text, one.tokens, one.cached) for one in said]


def batch(data, tensor):
    config, params = small.model(layers=1, depth=1)
    mesh, times = make_mesh(data=data, tensor=tensor), repeats(config, tensor)
    config = repeated(config, times)
    layer = {name: repeat_weight(name, leaf, times) if name in PARTS else leaf for name, leaf in params["text"]["layers"][0].items()}
    params = jax.device_put({**params, "text": {**params["text"], "layers": {0: layer}}}, param_shardings(config, mesh))
    spec = make_spec(config, BATCH, small.tokenizer(), height=56, width=84)
    Programs(spec, params, np.float32, [False], streams=4).wait("open_stream", "decode", False)
    engine, said = Engine(params, spec, small.tokenizer(), streams=4), []
    for row in range(4):
        engine.open(row, seed=row)
    with contextlib.ExitStack() as stack:
        for index in range(7):
            frames = np.random.default_rng(index).integers(0, 256, (4, 2, 3, 56, 84), np.uint8)
            tokens = engine.step(frames, {row: (index, index + 1.0) for row in engine.open_rows}).tokens()
            engine.note(tokens)
            said.append(tokens)
            if index in (1, 4):  # two leave, and come back into each other's row
                one, other = engine.take(1), engine.take(2)
                engine.close(1), engine.close(2)
                engine.put(1, other), engine.put(2, one)
            if index in (2, 5):  # one goes, and another comes
                engine.close(0)
                engine.open(0, seed=9)
            if index == 2:
                counted = stack.enter_context(Compilations())
    assert counted.count == 0, "programs were compiled after the first rounds"
    if mesh.size > 1:  # no device is sent what another one has cached
        cached, prompt = spec.cache.slots * 16 * 4, engine.prompt({row: (9.0, 10.0) for row in engine.open_rows})
        calls = {"ingest": (params, engine.state, frames, prompt, engine._key), "read_row": (engine.state, np.int32(1))}
        for name, call in calls.items():
            sent = collectives(engine.programs[name].lower(*call).compile().as_text(), mesh.size)
            assert (sent or data == 1) and all(each.kind == "all-reduce" or each.moved < cached for each in sent), (name, sent)
    return said


alone, *others = [{"captions": captions, "batch": batch}[sys.argv[1]](int(data), int(tensor)) for data, tensor in sys.argv[2:]]
assert len({str(each) for each in alone}) > 1
assert all(each == alone for each in others), (alone, others)
"""


# Captions of the bundled model; and a batch that streams join and leave, key-value heads repeated once
@pytest.mark.parametrize("work", [("captions", "11", "21", "12", "22"), ("batch", "11", "22")], ids=lambda work: work[0])
def test_the_words_are_the_same_on_four_devices(work):
    on_four_devices(FOUR, *work)
