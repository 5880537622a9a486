"""THE name table: where every tensor of a Hugging Face checkpoint stands in our parameter tree, read both ways.

A piece says how one source tensor fills one block of one parameter: reshape to `split`, transpose by `order`, put at
`index`. Read backwards it exports. Linear weights are [out, in] there and [in, out] here; query, key and value fill one
parameter, and so do gate and up.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

from svlm_jax.config import ModelConfig, TextConfig, VisionConfig

Index = tuple[int | slice, ...]
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One source tensor and the block of the parameter that it fills."""

    name: str  # canonical Hub name
    path: tuple[str | int, ...]  # parameter, as keys of the nested dict
    split: tuple[int, ...]  # the source tensor's axes, taken apart
    order: tuple[int, ...]  # our order of those axes
    index: Index = ()  # block of the parameter; () is all of it
    shape: tuple[int, ...] = ()  # the source tensor's shape; () means `split`

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.shape or self.split

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """The block that `tensor` (source shape) fills; a view where possible."""
        return tensor.reshape(self.split).transpose(self.order)

    def source_box(self, box: tuple[slice, ...]) -> tuple[slice, ...]:
        """A part of the block that the source tensor fills, as a part of that tensor in its axes taken apart (`split`)."""
        return tuple(box[self.order.index(axis)] for axis in range(len(self.split)))

    def export(self, parameter: np.ndarray) -> np.ndarray:
        """The source tensor, out of the whole parameter."""
        return self.export_block(parameter[self.index] if self.index else parameter)

    def export_block(self, block: np.ndarray) -> np.ndarray:
        """The source tensor, out of the block that it fills."""
        return np.ascontiguousarray(self.unordered(block)).reshape(self.source_shape)

    def unordered(self, block: np.ndarray) -> np.ndarray:
        """A view of the block with the source tensor's axes, taken apart."""
        return block.transpose(np.argsort(self.order))


def _linear(name: str, path, out: tuple[int, ...], inner: tuple[int, ...], *, index: Index = ()) -> Piece:
    """A Linear's [out, in] as [in..., out...]."""
    split = (*out, *inner)
    order = (*range(len(out), len(split)), *range(len(out)))
    return Piece(name, path, split, order, index, (math.prod(out), math.prod(inner)))


def _same(name: str, path, shape: tuple[int, ...], *, source: tuple[int, ...] = (), index: Index = ()) -> Piece:
    return Piece(name, path, shape, tuple(range(len(shape))), index, source)


def _norm(name: str, path: tuple[str | int, ...], width: int, *, biased: bool) -> list[Piece]:
    """A norm's weight and, of a layer norm, its bias."""
    bias = [_same(name + ".bias", (*path[:-1], f"{path[-1]}_bias"), (width,))] if biased else []
    return [_same(name + ".weight", path, (width,)), *bias]


class Words(NamedTuple):
    """What a vision tower's modules are called."""

    mlp_in: tuple[str, ...]  # of a block
    mlp_out: str
    merger: tuple[str, str, str]  # its norm, and its products in and out


TOWERS = {  # by the MLP of the blocks
    "swiglu": Words(("gate_proj", "up_proj"), "down_proj", ("ln_q", "mlp.0", "mlp.2")),
    "quick_gelu": Words(("fc1",), "fc2", ("ln_q", "mlp.0", "mlp.2")),
    "gelu_tanh": Words(("linear_fc1",), "linear_fc2", ("norm", "linear_fc1", "linear_fc2")),
}


def _vision_mlp(hub: str, at: tuple[str | int, ...], c: VisionConfig) -> list[Piece]:
    e, f, (inputs, output, _) = c.hidden_size, c.intermediate_size, TOWERS[c.mlp]
    pieces = []
    for i, name in enumerate(inputs):
        row = slice(i, i + 1)
        pieces += [
            _linear(f"{hub}{name}.weight", (*at, "gate_up"), (1, f), (e,), index=(ALL, row)),
            _same(f"{hub}{name}.bias", (*at, "gate_up_bias"), (1, f), source=(f,), index=(row,)),
        ]
    return [*pieces, _linear(f"{hub}{output}.weight", (*at, "down"), (e,), (f,)), _same(f"{hub}{output}.bias", (*at, "down_bias"), (e,))]


def _merger(hub: str, at: tuple[str | int, ...], c: VisionConfig, *, joined_norm: bool = False) -> list[Piece]:
    merged, (norm, inner, outer) = c.hidden_size * c.spatial_merge_size**2, TOWERS[c.mlp].merger
    return [
        *_norm(hub + norm, (*at, "merger_norm"), merged if joined_norm else c.hidden_size, biased=c.norm == "layer"),
        _linear(f"{hub}{inner}.weight", (*at, "merger_in"), (merged,), (merged,)),
        _same(f"{hub}{inner}.bias", (*at, "merger_in_bias"), (merged,)),
        _linear(f"{hub}{outer}.weight", (*at, "merger_out"), (c.out_hidden_size,), (merged,)),
        _same(f"{hub}{outer}.bias", (*at, "merger_out_bias"), (c.out_hidden_size,)),
    ]


def _vision(c: VisionConfig) -> list[Piece]:
    e, n, h, p, biased = c.hidden_size, c.num_heads, c.head_dim, c.patch_size, c.norm == "layer"
    root: tuple[str | int, ...] = ("vision",)
    conv = (e, c.in_channels, c.temporal_patch_size, p, p)
    pieces = [Piece("visual.patch_embed.proj.weight", (*root, "patch_embed"), (e, c.patch_features), (1, 0), (), conv)]
    if c.patch_bias:
        pieces.append(_same("visual.patch_embed.proj.bias", (*root, "patch_embed_bias"), (e,)))
    if c.position_grid:
        pieces.append(_same("visual.pos_embed.weight", (*root, "positions"), (c.position_grid**2, e)))
    for i in range(c.depth):
        hub, at = f"visual.blocks.{i}.", (*root, "blocks", i)
        pieces += [
            *_norm(hub + "norm1", (*at, "attention_norm"), e, biased=biased),
            _linear(hub + "attn.qkv.weight", (*at, "qkv"), (3, n, h), (e,)),
            _same(hub + "attn.qkv.bias", (*at, "qkv_bias"), (3, n, h), source=(3 * e,)),
            _linear(hub + "attn.proj.weight", (*at, "out"), (e,), (n, h)),
            _same(hub + "attn.proj.bias", (*at, "out_bias"), (e,)),
            *_norm(hub + "norm2", (*at, "mlp_norm"), e, biased=biased),
            *_vision_mlp(hub + "mlp.", at, c),
        ]
    pieces += _merger("visual.merger.", root, c)
    for i in range(len(c.deepstack_blocks)):
        pieces += _merger(f"visual.deepstack_merger_list.{i}.", (*root, "deepstack", i), c, joined_norm=True)
    return pieces


def _text(c: TextConfig, stacked: bool) -> list[Piece]:
    d, f, k, h = c.hidden_size, c.intermediate_size, c.num_key_value_heads, c.head_dim
    assert h is not None
    g = c.num_attention_heads // k
    query, key, value = slice(0, g), slice(g, g + 1), slice(g + 1, g + 2)
    pieces = [_same("model.embed_tokens.weight", ("text", "embedding"), (c.vocab_size, d))]
    for i in range(c.num_hidden_layers):
        hub = f"model.layers.{i}."
        at = ("text", "layers") if stacked else ("text", "layers", i)
        first: Index = (i,) if stacked else ()

        def block(*index: slice, first: Index = first) -> Index:
            return (*first, *index)

        pieces += [
            _same(hub + "input_layernorm.weight", (*at, "attention_norm"), (d,), index=block()),
            _linear(hub + "self_attn.q_proj.weight", (*at, "qkv"), (k, g, h), (d,), index=block(ALL, ALL, query)),
            _linear(hub + "self_attn.k_proj.weight", (*at, "qkv"), (k, 1, h), (d,), index=block(ALL, ALL, key)),
            _linear(hub + "self_attn.v_proj.weight", (*at, "qkv"), (k, 1, h), (d,), index=block(ALL, ALL, value)),
        ]
        if c.qkv_bias:
            pieces += [
                _same(hub + "self_attn.q_proj.bias", (*at, "qkv_bias"), (k, g, h), source=(k * g * h,), index=block(ALL, query)),
                _same(hub + "self_attn.k_proj.bias", (*at, "qkv_bias"), (k, 1, h), source=(k * h,), index=block(ALL, key)),
                _same(hub + "self_attn.v_proj.bias", (*at, "qkv_bias"), (k, 1, h), source=(k * h,), index=block(ALL, value)),
            ]
        if c.qk_norm:
            pieces += [
                _same(hub + "self_attn.q_norm.weight", (*at, "query_norm"), (h,), index=block()),
                _same(hub + "self_attn.k_norm.weight", (*at, "key_norm"), (h,), index=block()),
            ]
        pieces += [
            _linear(hub + "self_attn.o_proj.weight", (*at, "out"), (d,), (k, g, h), index=block()),
            _same(hub + "post_attention_layernorm.weight", (*at, "mlp_norm"), (d,), index=block()),
            _linear(hub + "mlp.gate_proj.weight", (*at, "gate_up"), (1, f), (d,), index=block(ALL, slice(0, 1))),
            _linear(hub + "mlp.up_proj.weight", (*at, "gate_up"), (1, f), (d,), index=block(ALL, slice(1, 2))),
            _linear(hub + "mlp.down_proj.weight", (*at, "down"), (d,), (f,), index=block()),
        ]
    pieces.append(_same("model.norm.weight", ("text", "norm"), (d,)))
    if not c.tie_word_embeddings:
        pieces.append(_linear("lm_head.weight", ("text", "head"), (c.vocab_size,), (d,)))
    return pieces


def name_table(config: ModelConfig, *, stacked: bool = False) -> list[Piece]:
    """Every tensor of a checkpoint of that model, once, with its place."""
    return _vision(config.vision) + _text(config.text, stacked)


_SPELLINGS = (
    (re.compile(r"^base_model\.model\."), ""),  # PEFT and some trainers
    (re.compile(r"^model\.visual\."), "visual."),  # in memory from transformers 4.52; FSDP and DeepSpeed dumps
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)


def canonical(name: str) -> str:
    """The Hub's spelling of a tensor's name, whichever library wrote it."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def in_memory(name: str) -> str:
    """The spelling of transformers' own modules, from release 4.52 on; `canonical` backwards."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
