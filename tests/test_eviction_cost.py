"""What evicting, and reading older words anew, cost at the 7B model's sizes, by the compiler's own count: nothing that grows with the windows.

Of seven layers of the 28: all cost the same, and what there is once for all of them weighs the more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import qwen2_5_vl_7b
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.model.qwen_vl import abstract_params, bind
from svlm_jax.streaming.engine import make_spec
from svlm_jax.streaming.evict import evict
from svlm_jax.streaming.refresh import refresh
from svlm_jax.streaming.state import state_shapes
from svlm_jax.tokenizer import Tokenizer

FACT_BYTES = 1 + 4 + 3 * 4  # of a slot: validity, token id, coordinate


@functools.cache
def cost(vision_window: int, text_window: int) -> dict[str, int]:
    """Of `evict` compiled alone with a donated state, 720p at 2 frames a second; float32, which a CPU updates in place."""
    config = StreamConfig(vision_window=vision_window, text_window=text_window)
    model = qwen2_5_vl_7b()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_hidden_layers=7))
    spec = make_spec(model, config, Tokenizer.load(tiny_path()), height=560, width=1008)
    state = state_shapes(spec, 1, jnp.float32)
    compiled = jax.jit(evict, donate_argnums=0).lower(state).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "cache": sum(a.size * a.dtype.itemsize for a in (*state.k, *state.v)),
        "slots": spec.cache.slots,
        "bytes": int(costs["bytes accessed"]),
        "temporary": memory.temp_size_in_bytes,
        "copied": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }


@pytest.mark.parametrize(("vision", "text", "share"), [(16, 16, 0.12), (16, 32, 0.30), (32, 16, 0.30)])
def test_eviction_touches_little_and_copies_nothing(vision, text, share):
    found = cost(vision, text)
    assert found["bytes"] <= share * found["cache"]
    assert found["temporary"] <= 0.02 * found["cache"]
    assert found["copied"] <= 1024  # all large results take the place of what they replace


def test_eviction_does_not_grow_with_the_windows():
    small, large = cost(16, 16), cost(64, 64)
    assert large["bytes"] - small["bytes"] <= FACT_BYTES * (large["slots"] - small["slots"])
    assert large["temporary"] == small["temporary"]


def test_words_are_read_anew_in_their_place_whatever_the_windows():
    model = qwen2_5_vl_7b()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_hidden_layers=2))
    found = []
    for window in (16, 48):
        config = StreamConfig(vision_window=window, text_window=window, text_refresh=8)
        spec = make_spec(model, config, Tokenizer.load(tiny_path()), height=560, width=1008)
        work = jax.jit(lambda params, state: refresh(bind(model, params), state, jnp.ones(1, bool)), donate_argnums=1)
        memory = work.lower(abstract_params(model), state_shapes(spec, 1, jnp.float32)).compile().memory_analysis()
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 1024  # the cache is written where it is
        found.append(memory.temp_size_in_bytes)
    assert found[0] == found[1]
