"""The least time that a stage can take: the bytes it must move over the device's bandwidth, or its operations over the matrix rate.

A stage takes the longer of the two. Weights are read once a program, by all streams together; every stream reads its own cache.
A multiply-add counts as two operations. Norms, biases, rotations, sampling and launches are free here, so no program reaches its floor.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from svlm_jax.bench.ceilings import Ceilings
from svlm_jax.config import TextConfig, VisionConfig
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.state import slot_bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a stage must do."""

    bytes: float
    operations: float
    narrow: float = 0.0  # operations of products in eight bits

    def milliseconds(self, ceilings: Ceilings) -> float:
        computing = self.operations / ceilings.matmul_tflops + self.narrow / (ceilings.fp8_tflops or ceilings.matmul_tflops)
        return 1e-9 * max(self.bytes / ceilings.copy_tbps, computing)


def floors(
    spec: StreamSpec,
    ceilings: Ceilings,
    *,
    streams: int,
    cached_tokens: float,
    dtype: Any,
    weight_dtype: Any = None,
    narrow: bool = False,
) -> dict[str, float]:
    """Milliseconds of each stage at least: vision, prefill, decode_step, first_word, round.

    Args:
      cached_tokens: valid slots of one stream at the end of a round.
      dtype: of the weights, and of keys and values that are not kept in eight bits.
      weight_dtype: of the decoder's products and the head, where they are kept in another.
      narrow: whether vision's weights are kept so too, and the products of vision and prefill are in eight bits.
    """
    work = {
        "vision": vision_work(spec, streams, dtype, weight_dtype if narrow else None),
        "prefill": prefill_work(spec, streams, cached_tokens, dtype, weight_dtype, narrow=narrow),
        "decode_step": decode_work(spec, streams, cached_tokens, dtype, weight_dtype),
    }
    out = {name: w.milliseconds(ceilings) for name, w in work.items()}
    out["first_word"] = out["vision"] + out["prefill"]
    # The first token comes from the prefill, and the last one is not run
    out["round"] = out["first_word"] + (spec.stream.max_new_tokens - 1) * out["decode_step"]
    return out


def vision_work(spec: StreamSpec, streams: int, dtype: Any, weight_dtype: Any = None) -> Work:
    """Every grid (pair of frames) of a round through the tower; with a `weight_dtype` the products of its blocks and its merger are in eight bits."""
    c, grids = spec.model.vision, spec.grid[0] * streams
    e, merge = c.hidden_size, c.spatial_merge_size**2
    patches = spec.grid[1] * spec.grid[2] * merge
    blocks, embedding = c.depth * _block_parameters(c), c.patch_features * e
    merged = e * merge
    merger = merged * merged + merged * c.out_hidden_size
    window = patches if c.window_size is None else min((c.window_size // c.patch_size) ** 2, patches)
    attention = 4 * e * patches * sum(patches if c.sees_all(index) else window for index in range(c.depth))
    products = grids * (2 * patches * blocks + 2 * patches / merge * merger)
    rest = grids * (2 * patches * embedding + attention)
    size = (blocks + merger) * jnp.dtype(weight_dtype or dtype).itemsize + embedding * jnp.dtype(dtype).itemsize
    return Work(size, rest + products) if weight_dtype is None else Work(size, rest, products)


def prefill_work(
    spec: StreamSpec, streams: int, cached_tokens: float, dtype: Any, weight_dtype: Any = None, *, narrow: bool = False
) -> Work:
    """A round's chunk, its padding counted, through the decoder over what is cached, and one row through the head. Of the
    embedding a few rows are read, which count as nothing.

    "recompute": instead of the chunk, the whole visible sequence, and nothing before it.
    """
    before_turn = cached_tokens - (spec.stream.max_new_tokens - 1)
    rows = before_turn if spec.stream.mode == "recompute" else spec.cache.chunk_rows
    return _decoder_work(spec, streams, rows, max(0.0, before_turn - rows), dtype, weight_dtype, narrow=narrow)


def decode_work(spec: StreamSpec, streams: int, cached_tokens: float, dtype: Any, weight_dtype: Any = None) -> Work:
    """One token of every stream."""
    return _decoder_work(spec, streams, 1, cached_tokens, dtype, weight_dtype)


def _decoder_work(
    spec: StreamSpec, streams: int, rows: float, past: float, dtype: Any, weight_dtype: Any, *, narrow: bool = False
) -> Work:
    t = spec.model.text
    layers, head_dim = t.num_hidden_layers, t.head_dim or 0
    cache = streams * past * slot_bytes(spec, dtype)
    products, head = 2 * rows * layers * layer_parameters(t), 2 * t.vocab_size * t.hidden_size
    attention = 4 * t.num_attention_heads * head_dim * layers * rows * (past + rows / 2)
    weights = (layers * layer_parameters(t) + t.vocab_size * t.hidden_size) * jnp.dtype(weight_dtype or dtype).itemsize
    rest = head + attention
    return Work(weights + cache, streams * rest, streams * products) if narrow else Work(weights + cache, streams * (products + rest))


def layer_parameters(t: TextConfig) -> int:
    """Of the products of one decoder layer."""
    heads = (2 * t.num_attention_heads + 2 * t.num_key_value_heads) * (t.head_dim or 0)
    return t.hidden_size * (heads + 3 * t.intermediate_size)


def _block_parameters(c: VisionConfig) -> int:
    """Of the products of one block of the vision tower."""
    return c.hidden_size * (4 * c.hidden_size + (c.mlp_inputs + 1) * c.intermediate_size)
