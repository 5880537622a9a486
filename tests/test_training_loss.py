"""The loss over labelled tokens: the same in chunks, at sizes where all logits at once would not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import small_training

from svlm_jax.configs.models import qwen2_5_vl_7b
from svlm_jax.data.batch import IGNORED, Batch
from svlm_jax.model.qwen_vl import abstract_params, bind, init_params
from svlm_jax.training.loss import chunked_loss, plain_loss, targets_of


def test_chunks_equal_the_whole_with_gradients():
    config, batch = small_training.model(), small_training.batch()
    params = init_params(config, jax.random.key(0), stacked=True)
    x = jax.random.normal(jax.random.key(1), (*batch.tokens.shape, config.text.hidden_size))

    def run(loss):
        return jax.jit(jax.value_and_grad(lambda params, x: loss(bind(config, params).text, x, batch), argnums=(0, 1), has_aux=True))

    (plain, plain_sums), plain_gradients = run(plain_loss)(params, x)
    for chunk in (7, 64):  # the last chunk is filled up; a chunk is more than a row
        (found, sums), gradients = run(lambda *args, chunk=chunk: chunked_loss(*args, chunk=chunk))(params, x)
        np.testing.assert_allclose(found, plain, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, plain_sums)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, plain_gradients)
    assert float(plain_sums.labels) == (batch.labels != IGNORED).sum()
    assert np.abs(np.asarray(plain_gradients[1])).sum() > 1


def test_tokens_predict_the_next_of_their_own_segment():
    batch = small_training.batch(1)
    row = dataclasses.replace(batch, labels=batch.tokens)  # all labelled, first tokens of segments too
    targets, asked = targets_of(row)
    segments = batch.segments[0]
    for t, asks in enumerate(np.asarray(asked)[0]):
        assert asks == (t + 1 < len(segments) and segments[t] == segments[t + 1] != 0)
        assert not asks or targets[0, t] == batch.tokens[0, t + 1]


def test_no_array_of_all_tokens_and_words():
    config = qwen2_5_vl_7b()
    config = dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, depth=1), text=dataclasses.replace(config.text, num_hidden_layers=1)
    )
    tokens, width = 20_480, config.text.hidden_size
    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    rest = dict.fromkeys((f.name for f in dataclasses.fields(Batch)), row)
    params = abstract_params(config, stacked=True)
    ends = {name: leaf for name, leaf in params["text"].items() if name in ("norm", "head")}

    def loss(ends, x, batch):
        filled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        text = bind(config, {**filled, "text": {**filled["text"], **ends}}).text
        return chunked_loss(text, x, batch, chunk=512)[0]

    x = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(ends, x, Batch(**rest)).compile()
    chunk, head = 512 * config.text.vocab_size * 4, config.text.vocab_size * width * 4
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    # One gradient of the head, and nothing that a chunk's condition hands on to the backward pass
    assert temporaries < 1.2 * head + 4 * chunk < tokens * config.text.vocab_size * 4
