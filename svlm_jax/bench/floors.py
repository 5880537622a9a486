"""The least time that a stage can take: the bytes it must move over the device's bandwidth, or its operations over the matrix rate.

A stage takes the longer of the two. Weights are read once a program, by all streams together; every stream reads its own cache.
A multiply-add counts as two operations. Norms, rotations, sampling and launches are free here, so no program reaches its floor.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from svlm_jax.bench.ceilings import Ceilings
from svlm_jax.config import TextConfig, VisionConfig
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.streaming.layout import StreamSpec


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a stage must do."""

    bytes: float
    operations: float

    def milliseconds(self, ceilings: Ceilings) -> float:
        return 1e3 * max(self.bytes / (ceilings.copy_tbps * 1e12), self.operations / (ceilings.matmul_tflops * 1e12))


def floors(spec: StreamSpec, ceilings: Ceilings, *, streams: int, cached_tokens: float, dtype: Any) -> dict[str, float]:
    """Milliseconds of each stage at least: vision, prefill, decode_step, first_word, round.

    Args:
      cached_tokens: valid slots of one stream at the end of a round.
      dtype: of the weights, and of keys and values.
    """
    work = {
        "vision": vision_work(spec, streams, dtype),
        "prefill": prefill_work(spec, streams, cached_tokens, dtype),
        "decode_step": decode_work(spec, streams, cached_tokens, dtype),
    }
    out = {name: w.milliseconds(ceilings) for name, w in work.items()}
    out["first_word"] = out["vision"] + out["prefill"]
    # The first token comes from the prefill, and the last one is not run
    out["round"] = out["first_word"] + (spec.stream.max_new_tokens - 1) * out["decode_step"]
    return out


def vision_work(spec: StreamSpec, streams: int, dtype: Any) -> Work:
    """Every grid (pair of frames) of a round through the tower."""
    c, grids = spec.model.vision, spec.grid[0] * streams
    e, merge = c.hidden_size, c.spatial_merge_size**2
    patches = spec.grid[1] * spec.grid[2] * merge
    products = c.depth * _block_parameters(c) + c.patch_features * e
    merged = e * merge
    merger = merged * merged + merged * c.out_hidden_size
    full = sum(index < c.depth for index in c.fullatt_block_indexes)
    window = (c.window_size // c.patch_size) ** 2
    attention = 4 * e * patches * (full * patches + (c.depth - full) * min(window, patches))
    operations = grids * (2 * patches * products + 2 * patches / merge * merger + attention)
    return Work(_bytes(abstract_params(spec.model, dtype=dtype)["vision"]), operations)


def prefill_work(spec: StreamSpec, streams: int, cached_tokens: float, dtype: Any) -> Work:
    """A round's chunk, its padding counted, through the decoder over what is cached, and one row through the head.

    "recompute": instead of the chunk, the whole visible sequence, and nothing before it.
    """
    t, recompute = spec.model.text, spec.stream.mode == "recompute"
    turn = spec.stream.max_new_tokens - 1
    rows = cached_tokens - turn if recompute else spec.cache.chunk_rows
    past = 0 if recompute else max(0.0, cached_tokens - turn - rows)
    return _decoder_work(spec, streams, rows, past, dtype, t.num_hidden_layers)


def decode_work(spec: StreamSpec, streams: int, cached_tokens: float, dtype: Any) -> Work:
    """One token of every stream; in mode "recompute" with all that is visible before it."""
    layers = spec.model.text.num_hidden_layers
    if spec.stream.mode == "recompute":
        return _decoder_work(spec, streams, cached_tokens, 0, dtype, layers)
    return _decoder_work(spec, streams, 1, cached_tokens, dtype, layers)


def _decoder_work(spec: StreamSpec, streams: int, rows: float, past: float, dtype: Any, layers: int) -> Work:
    t = spec.model.text
    head_dim = t.head_dim or 0
    weights = text_bytes(spec, dtype)
    cache = streams * past * 2 * layers * t.num_key_value_heads * head_dim * jnp.dtype(dtype).itemsize
    products = 2 * (rows * layers * _layer_parameters(t) + t.vocab_size * t.hidden_size)
    attention = 4 * t.num_attention_heads * head_dim * layers * rows * (past + rows / 2)
    return Work(weights + cache, streams * (products + attention))


def text_bytes(spec: StreamSpec, dtype: Any) -> float:
    """Bytes of the weights that every step of the decoder reads: of an untied embedding only rows are, which count as nothing."""
    text = abstract_params(spec.model, dtype=dtype)["text"]
    return _bytes(text) - (0 if spec.model.text.tie_word_embeddings else _bytes(text["embedding"]))


def _layer_parameters(t: TextConfig) -> int:
    """Of the products of one decoder layer."""
    heads = (2 * t.num_attention_heads + 2 * t.num_key_value_heads) * (t.head_dim or 0)
    return t.hidden_size * (heads + 3 * t.intermediate_size)


def _block_parameters(c: VisionConfig) -> int:
    """Of the products of one block of the vision tower."""
    return c.hidden_size * (4 * c.hidden_size + 3 * c.intermediate_size)


def _bytes(tree: Any) -> float:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
