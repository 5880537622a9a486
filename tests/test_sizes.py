"""The programs that serve at the published sizes: traced, with nothing allocated.

All of a 7B model; of the others as many layers as there are kinds of, since tracing takes its time by layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from svlm_jax.checkpoints.names import name_table
from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import MODELS
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.model.qwen_vl import abstract_params, forward
from svlm_jax.streaming.engine import make_spec
from svlm_jax.streaming.state import prompt_shapes, state_shapes
from svlm_jax.streaming.step import decode, ingest, open_stream
from svlm_jax.tokenizer import Tokenizer

STREAMS, TOKENS = 2, 20


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(("name", "layers"), [("7b", 28), ("72b", 4), ("qwen3-vl-4b", 4), ("qwen3-vl-8b", 4)])
def test_programs_at_full_size(name, layers):
    model = MODELS[name]()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_hidden_layers=layers))
    side = model.vision.merged_patch_size
    spec = make_spec(model, StreamConfig(max_new_tokens=TOKENS), Tokenizer.load(tiny_path()), height=side * 20, width=side * 36)
    params, state = abstract_params(model, dtype=jnp.bfloat16), state_shapes(spec, STREAMS, jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), STREAMS))
    frames = shape(STREAMS, 2, 3, side * 20, side * 36, dtype=jnp.uint8)
    prompt = prompt_shapes(spec, STREAMS)
    opened = jax.eval_shape(open_stream, params, state, shape(), shape(spec.cache.words_capacity), shape())
    shown, first = jax.eval_shape(ingest, params, opened, frames, prompt, key)
    said, turn = jax.eval_shape(decode, params, shown, key)
    assert opened == shown == said == state
    assert first.shape == (STREAMS,) and turn.tokens.shape == (STREAMS, TOKENS)
    t = model.text
    assert len(state.k) == layers
    assert state.k[0].shape == (STREAMS, t.num_key_value_heads, spec.cache.slots, 128) and state.k[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "stacked"),
    [("3b", True), ("7b", False), ("7b", True), ("32b", True), ("72b", True), ("qwen3-vl-4b", False), ("qwen3-vl-8b", True)],
)
def test_the_plain_forward_at_full_size(name, stacked):
    model = MODELS[name]()
    params = abstract_params(model, dtype=jnp.bfloat16, stacked=stacked)
    run = functools.partial(forward, config=model)
    side = model.vision.merged_patch_size
    clip, places = shape(1, 2, 3, 2 * side, 3 * side, dtype=jnp.uint8), shape(1, 6)
    logits = jax.eval_shape(run, params, tokens=shape(1, 16), positions=shape(1, 16, 3), visuals=[clip], places=places)
    assert logits.shape == (1, 16, model.text.vocab_size) and logits.dtype == jnp.float32


@pytest.mark.parametrize(("name", "billions"), [("qwen3-vl-4b", 4.44), ("qwen3-vl-8b", 8.77)])
def test_parameters_are_as_many_as_published(name, billions):
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(MODELS[name](), stacked=True)))
    assert round(count / 1e9, 2) == billions


def test_every_tensor_of_qwen3_vl_has_its_shape():
    """As the published files have them; DeepStack's mergers norm what they have joined."""
    found = {piece.name: piece.source_shape for piece in name_table(MODELS["qwen3-vl-8b"]())}
    assert len(found) == 750
    assert found["visual.patch_embed.proj.weight"] == (1152, 3, 2, 16, 16) and found["visual.pos_embed.weight"] == (2304, 1152)
    assert found["visual.merger.norm.weight"] == (1152,) and found["visual.merger.linear_fc2.weight"] == (4096, 4608)
    assert found["visual.deepstack_merger_list.2.norm.bias"] == (4608,) and found["visual.deepstack_merger_list.2.linear_fc1.weight"] == (4608, 4608)
    assert found["model.layers.35.self_attn.q_norm.weight"] == (128,) and found["model.layers.35.self_attn.k_proj.weight"] == (1024, 4096)
    four = {piece.name: piece.source_shape for piece in name_table(MODELS["qwen3-vl-4b"]())}
    assert four["model.layers.0.self_attn.o_proj.weight"] == (2560, 4096) and "lm_head.weight" not in four and "lm_head.weight" in found
