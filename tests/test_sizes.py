"""The programs that serve at the published sizes: traced, with nothing allocated."""

import functools

import jax
import jax.numpy as jnp
import pytest

from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import MODELS
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.model.qwen_vl import abstract_params, forward
from svlm_jax.streaming.engine import make_spec
from svlm_jax.streaming.state import Prompt, state_shapes
from svlm_jax.streaming.step import decode, ingest, open_stream
from svlm_jax.tokenizer import Tokenizer

STREAMS, TOKENS = 2, 20


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("name", ["7b", "72b"])
def test_programs_at_full_size(name):
    model = MODELS[name]()
    spec = make_spec(model, StreamConfig(max_new_tokens=TOKENS), Tokenizer.load(tiny_path()), height=560, width=1008)
    params, state = abstract_params(model, dtype=jnp.bfloat16), state_shapes(spec, STREAMS, jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), STREAMS))
    frames = shape(STREAMS, 2, 3, 560, 1008, dtype=jnp.uint8)
    question = (shape(STREAMS, spec.stream.question_capacity), shape(STREAMS))
    prompt = Prompt(shape(STREAMS, spec.time_capacity), shape(STREAMS), shape(STREAMS, dtype=jnp.bool_), *question)
    opened = jax.eval_shape(open_stream, params, state, shape(), shape(spec.cache.words_capacity), shape())
    shown, first = jax.eval_shape(ingest, params, opened, frames, prompt, key)
    said, turn = jax.eval_shape(decode, params, shown, key)
    assert opened == shown == said == state
    assert first.shape == (STREAMS,) and turn.tokens.shape == (STREAMS, TOKENS)
    t = model.text
    assert len(state.k) == t.num_hidden_layers
    assert state.k[0].shape == (STREAMS, t.num_key_value_heads, spec.cache.slots, 128) and state.k[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(("name", "stacked"), [("3b", True), ("7b", False), ("7b", True), ("32b", True), ("72b", True)])
def test_the_plain_forward_at_full_size(name, stacked):
    model = MODELS[name]()
    params = abstract_params(model, dtype=jnp.bfloat16, stacked=stacked)
    run = functools.partial(forward, config=model)
    clip, places = shape(1, 2, 3, 56, 84, dtype=jnp.uint8), shape(1, 6)
    logits = jax.eval_shape(run, params, tokens=shape(1, 16), positions=shape(1, 16, 3), visuals=[clip], places=places)
    assert logits.shape == (1, 16, model.text.vocab_size) and logits.dtype == jnp.float32
