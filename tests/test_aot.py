"""The programs that serve, compiled ahead of time for TPUs that are not here: 7B widths, few layers; needs the libtpu package.

All layers take five minutes: `benchmarks/aot.py` compiles those, and `benchmarks/tpu_aot.json` has what it found.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu", reason="compiling for TPUs takes the compiler of the libtpu package")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import aot

from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import qwen2_5_vl_7b
from svlm_jax.streaming.state import state_shapes

FACT_BYTES = 1 + 4 + 3 * 4  # of a slot: validity, token id, coordinate


@functools.cache
def eviction(vision_window: int, text_window: int) -> dict[str, int]:
    """Cost of `evict` alone on one v6e chip: the state of seven of the 7B model's layers, in bfloat16."""
    spec = aot.stream_spec(aot.cut(qwen2_5_vl_7b(), 7, 1), StreamConfig(vision_window=vision_window, text_window=text_window))
    state = state_shapes(spec, 1, jnp.bfloat16)
    found = aot.measure(aot.compile_program(spec, "evict", aot.topology_mesh("v6e:1x1")))
    return found | {"cache": sum(a.size * a.dtype.itemsize for a in (*state.k, *state.v)), "slots": spec.cache.slots}


@pytest.mark.parametrize(("vision", "text", "share"), [(16, 16, 0.12), (16, 32, 0.30), (32, 16, 0.30)])
def test_eviction_touches_little_and_copies_nothing(vision, text, share):
    found = eviction(vision, text)
    assert found["bytes_accessed"] <= share * found["cache"]
    assert found["temp_bytes"] <= 0.02 * found["cache"]


def test_eviction_does_not_grow_with_the_windows():
    small, large = eviction(16, 16), eviction(64, 64)
    assert large["bytes_accessed"] - small["bytes_accessed"] <= FACT_BYTES * (large["slots"] - small["slots"])
    assert large["temp_bytes"] - small["temp_bytes"] <= FACT_BYTES * (large["slots"] - small["slots"])


HEADS_BY_CHIPS = [(name, topology) for name in aot.PROGRAMS for topology in ("v6e:1x1", "v5e:2x2")] + [("decode", "v5p:2x2x1")]


@pytest.mark.parametrize(("program", "topology"), HEADS_BY_CHIPS)
def test_every_program_compiles(program, topology):
    spec = aot.stream_spec(aot.cut(qwen2_5_vl_7b(), 2, 2), StreamConfig())
    mesh = aot.topology_mesh(topology)
    compiled = aot.compile_program(spec, program, mesh)
    found = aot.measure(compiled)
    if program != "evict":
        assert "tpu_custom_call" in (compiled.as_text() or "")  # attention is the kernel
    state = state_shapes(spec, 1, jnp.bfloat16)
    cache = sum(a.size * a.dtype.itemsize for a in (*state.k, *state.v)) // mesh.size
    assert found["alias_bytes"] >= cache  # the donated cache is updated in place
    if program == "decode":
        assert found["temp_bytes"] < 0.5 * cache


@pytest.mark.parametrize(("chip", "slots"), [("v5e:2x2", 65_536), ("v5p:2x2x1", 15_360), ("v6e:2x2", 2048), ("tpu7x:2x2x1", 65_536)])
@pytest.mark.parametrize("tokens", [1, 768])
def test_the_attention_kernel_compiles_for_every_chip(chip, slots, tokens):
    found = aot.measure(aot.compile_kernel(chip, slots=slots, tokens=tokens, streams=1))
    cache = 2 * 4 * slots * 128 * 2
    assert found["temp_bytes"] < (0.02 * cache if tokens == 1 else 64 << 20)  # a chunk's queries and outputs, whatever the cache


def test_the_attention_kernel_reads_eight_bits_as_they_are():
    wide, narrow = (aot.measure(aot.compile_kernel("v5e:2x2", slots=65_536, tokens=1, streams=1, kv=kv)) for kv in (None, "int8"))
    assert narrow["temp_bytes"] <= wide["temp_bytes"] + (1 << 20)  # no copy of the keys, nor of their scales
    assert narrow["arguments_bytes"] < 0.53 * wide["arguments_bytes"]


def test_eviction_and_decoding_with_keys_and_values_in_eight_bits_copy_nothing():
    spec = aot.stream_spec(aot.cut(qwen2_5_vl_7b(), 2, 1), StreamConfig(kv="int8"))
    state = state_shapes(spec, 1, jnp.bfloat16)
    cache = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((state.k, state.v)))
    for program in ("evict", "decode"):
        compiled = aot.compile_program(spec, program, aot.topology_mesh("v6e:1x1"))
        found = aot.measure(compiled)
        assert found["alias_bytes"] >= cache and found["temp_bytes"] < 0.1 * cache
        assert program == "evict" or "tpu_custom_call" in (compiled.as_text() or "")


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_decoding_makes_no_wide_copy_of_weights_in_eight_bits(weights):
    spec = aot.stream_spec(aot.cut(qwen2_5_vl_7b(), 1, 1), StreamConfig())
    found = aot.measure(aot.compile_program(spec, "decode", aot.topology_mesh("v6e:1x1"), quantization=aot.WEIGHTS[weights]))
    assert found["temp_bytes"] < 8 << 20  # the smallest of the weights would be 25 MB
