"""The vision towers of Qwen2.5-VL, Qwen2-VL and Qwen3-VL: frames to one token for each 2x2 block of patches.

One grid (a pair of frames) is a row of the batch, and every shape is fixed by the frame's size. The patches of a grid
are kept in window order throughout, windows padded to one size at the right and bottom edges: window attention is a
reshape, and full attention masks the padding. A tower without windows has one window, the grid.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from svlm_jax.config import VisionConfig, VisionMlp
from svlm_jax.model.layers import Declare, fan_in, layer_norm, once, ones, rms_norm, zeros
from svlm_jax.model.learned_positions import stretched
from svlm_jax.model.quantized import product
from svlm_jax.model.rope import Rotation, rotate, vision_rotation
from svlm_jax.types import Array, Bool, Float, Int, UInt8

PIXELS = {  # mean and deviation of each colour, in units of full scale
    "clip": (np.array([0.48145466, 0.4578275, 0.40821073], np.float32), np.array([0.26862954, 0.26130258, 0.27577711], np.float32)),  # arXiv 2103.00020
    "symmetric": (np.full(3, 0.5, np.float32), np.full(3, 0.5, np.float32)),
}


class Features(NamedTuple):
    """What the decoder is given of a clip's C tokens."""

    embedded: Float[Array, "B C D"]  # in the place of token embeddings
    deep: tuple[Float[Array, "B C D"], ...] = ()  # added to what the decoder's first layers put out (DeepStack)


@dataclasses.dataclass(frozen=True)
class WindowOrder:
    """Where the patches of one grid stand while they are in window order. Static, NumPy."""

    windows: int  # attention windows
    window_patches: int  # patches of a window, padding included
    source: np.ndarray  # int32 [windows * window_patches]: patch (processor order) in each place; padding repeats patch 0
    valid: np.ndarray  # bool [windows, window_patches]
    restore: np.ndarray  # int32 [tokens]: place of each merged token, counted in merged tokens
    rotation: Rotation  # [windows * window_patches, head_dim / 2]


@functools.lru_cache(maxsize=64)
def window_order(config: VisionConfig, height: int, width: int) -> WindowOrder:
    """The window order of a frame of height x width pixels (multiples of a merged patch)."""
    merge, side = config.spatial_merge_size, config.merged_patch_size
    rows, columns = height // side, width // side
    tall, wide = (rows, columns) if config.window_size is None else (config.window_size // side,) * 2
    down, across = -(-rows // tall), -(-columns // wide)
    token = np.full((down * tall, across * wide), -1, np.int64)
    token[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    token = token.reshape(down, tall, across, wide).transpose(0, 2, 1, 3).reshape(down * across, tall * wide)
    patches = token[..., None] * merge**2 + np.arange(merge**2)  # processor order: a token's patches are neighbours
    valid = np.repeat(token >= 0, merge**2, axis=1)
    source = np.where(valid, patches.reshape(valid.shape), 0).reshape(-1)
    restore = np.empty(rows * columns, np.int32)
    flat = token.reshape(-1)
    restore[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    cos, sin = vision_rotation(rows * merge, columns * merge, merge, config.head_dim)
    return WindowOrder(down * across, valid.shape[1], source.astype(np.int32), valid, restore, Rotation(cos[source], sin[source]))


def patchify(config: VisionConfig, frames: UInt8[Array, "B F 3 height width"]) -> Float[Array, "grids P features"]:
    """Frames to rows of normalised patch vectors (colour, frame, y, x) in processor order, float32; grids = B * ceil(F / 2).

    An odd last frame is repeated.
    """
    patch, merge, depth = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    if frames.shape[1] % depth:
        frames = jnp.concatenate([frames, jnp.repeat(frames[:, -1:], depth - frames.shape[1] % depth, axis=1)], axis=1)
    batch, count, channels, height, width = frames.shape
    x = frames.astype(jnp.float32) * np.float32(1 / 255)
    mean, deviation = (a[:, None, None] for a in PIXELS[config.pixels])
    x = (x - mean) / deviation
    h, w = height // config.merged_patch_size, width // config.merged_patch_size
    x = x.reshape(batch, count // depth, depth, channels, h, merge, patch, w, merge, patch)
    x = x.transpose(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # b, grid, h, w, row in merge, column in merge, colour, frame, y, x
    return x.reshape(batch * (count // depth), h * w * merge**2, config.patch_features)


def normalise(x: Float[Array, "... E"], weight: nnx.Param, bias: nnx.Param | None, epsilon: float) -> Float[Array, "... E"]:
    """RMS norm, or layer norm where there is a bias."""
    return rms_norm(x, weight[...], epsilon) if bias is None else layer_norm(x, weight[...], bias[...], epsilon)


ACTIVATIONS: dict[VisionMlp, Callable[[Array], Array]] = {  # what is between the MLP's products, of its inputs [..., inputs, F]
    "swiglu": lambda x: jax.nn.silu(x[..., 0, :]) * x[..., 1, :],  # of gate and up
    "quick_gelu": lambda x: x[..., 0, :] * jax.nn.sigmoid(1.702 * x[..., 0, :]),
    "gelu_tanh": lambda x: jax.nn.gelu(x[..., 0, :], approximate=True),
}


Attend = Callable[..., Float[Array, "grids W p N H"]]  # of queries, keys and values [grids, W, p, N, H]


class VisionBlock(nnx.Module):
    """Attention over windows or over the whole grid, then the MLP."""

    def __init__(self, config: VisionConfig, declare: Declare):
        c, e, f, n, h = config, config.hidden_size, config.intermediate_size, config.num_heads, config.head_dim
        layered = c.norm == "layer"
        self.config = c
        self.attention_norm = declare((e,), ("norm",), ones)
        self.attention_norm_bias = declare((e,), ("norm",), zeros) if layered else None
        self.qkv = declare((e, 3, n, h), ("embed", None, "heads", "head_dim"), fan_in(-4))
        self.qkv_bias = declare((3, n, h), (None, "heads", "head_dim"), zeros)
        self.out = declare((n, h, e), ("heads", "head_dim", "embed"), fan_in(-3, -2))
        self.out_bias = declare((e,), ("norm",), zeros)
        self.mlp_norm = declare((e,), ("norm",), ones)
        self.mlp_norm_bias = declare((e,), ("norm",), zeros) if layered else None
        self.gate_up = declare((e, c.mlp_inputs, f), ("embed", None, "mlp"), fan_in(-3))  # of one input: up alone
        self.gate_up_bias = declare((c.mlp_inputs, f), (None, "mlp"), zeros)
        self.down = declare((f, e), ("mlp", "embed"), fan_in(-2))
        self.down_bias = declare((e,), ("norm",), zeros)

    def __call__(
        self, x: Float[Array, "grids W p E"], rotation: Rotation, valid: Bool[Array, "W p"] | None, *, full: bool, attend: Attend | None = None
    ) -> Float[Array, "grids W p E"]:
        """x in window order: W windows of p patches, those of `valid` real (None: all); `full` attends across windows.

        With `attend`, which patches see each other is the caller's, and `valid` is not looked at.
        """
        epsilon = self.config.rms_norm_eps
        with jax.named_scope("full_attention" if full else "window_attention"):
            y = normalise(x, self.attention_norm, self.attention_norm_bias, epsilon)
            q, k, v = jnp.moveaxis(product("bwpe,ecnh->bwpcnh", y, self.qkv[...]) + self.qkv_bias[...], 3, 0)
            q, k = rotate(q, rotation), rotate(k, rotation)
            seen = attend(q, k, v) if attend else _attend(q, k, v, valid, full=full)
            heads = seen.reshape(*x.shape[:-1], -1)
            x = x + product("bwpn,ne->bwpe", heads, self.out[...].reshape(heads.shape[-1], -1)) + self.out_bias[...]
        with jax.named_scope("mlp"):
            y = normalise(x, self.mlp_norm, self.mlp_norm_bias, epsilon)
            gate_up = product("bwpe,ecf->bwpcf", y, self.gate_up[...]) + self.gate_up_bias[...]
            return x + product("bwpf,fe->bwpe", ACTIVATIONS[self.config.mlp](gate_up), self.down[...]) + self.down_bias[...]


def _attend(q: Array, k: Array, v: Array, valid: Array | None, *, full: bool) -> Array:
    """Attention within windows, or (`full`) across all windows of a grid; long runs of patches by cuDNN where there is one."""
    shape = q.shape
    if full:
        q, k, v = (a.reshape(shape[0], 1, -1, *shape[3:]) for a in (q, k, v))
        valid = None if valid is None else valid.reshape(1, -1)
    mask = None if valid is None else valid[:, None, None, :]

    def plain(q: Array, k: Array, v: Array) -> Array:
        return masked_attention(q, k, v, mask)

    # cuDNN takes 16-bit numbers and heads of a multiple of 8, and must be there for tracing; over few patches plain products are as fast
    if not full or q.dtype != jnp.bfloat16 or q.shape[-1] % 8 or q.shape[2] < 512 or jax.default_backend() != "gpu":
        return plain(q, k, v).reshape(shape)

    def cudnn(q: Array, k: Array, v: Array) -> Array:
        square = None if mask is None else jnp.broadcast_to(mask, (1, 1, q.shape[2], k.shape[2]))  # it takes no mask of one row
        return jax.nn.dot_product_attention(q[:, 0], k[:, 0], v[:, 0], mask=square, implementation="cudnn")[:, None]

    return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=plain).reshape(shape)


def masked_attention(
    q: Float[Array, "grids W p N H"], k: Float[Array, "grids W s N H"], v: Float[Array, "grids W s N H"], mask: Bool[Array, "..."] | None
) -> Float[Array, "grids W p N H"]:
    """Plain attention, softmax in float32, where `mask` (broadcast to [grids, W, N, p, s]) is true."""
    scores = jnp.einsum("bwpnh,bwsnh->bwnps", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, np.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bwnps,bwsnh->bwpnh", weights, v)


_block = once(VisionBlock.__call__, "full")


class Merger(nnx.Module):
    """Joins 2x2 patches into one token of the decoder: a norm of each patch, or (`joined_norm`) of the four as one, then an MLP."""

    def __init__(self, config: VisionConfig, declare: Declare, *, joined_norm: bool = False):
        c, merged = config, config.hidden_size * config.spatial_merge_size**2
        normed = merged if joined_norm else c.hidden_size
        self.config = c
        self.merger_norm = declare((normed,), ("norm",), ones)
        self.merger_norm_bias = declare((normed,), ("norm",), zeros) if c.norm == "layer" else None
        self.merger_in = declare((merged, merged), ("embed", "mlp"), fan_in(-2))
        self.merger_in_bias = declare((merged,), ("mlp",), zeros)
        self.merger_out = declare((merged, c.out_hidden_size), ("mlp", "embed"), fan_in(-2))
        self.merger_out_bias = declare((c.out_hidden_size,), ("norm",), zeros)

    def merge(self, x: Float[Array, "grids W p E"], order: Int[Array, "C"] | slice) -> Float[Array, "grids C D"]:
        """A block's output, patches in window order, as merged tokens: those at the places of `order`, in its order."""
        with jax.named_scope("merger"):
            x = x.reshape(x.shape[0], -1, self.merger_norm.shape[0])
            x = normalise(x, self.merger_norm, self.merger_norm_bias, self.config.rms_norm_eps)
            x = x.reshape(x.shape[0], -1, self.merger_in.shape[0])[:, order]
            x = product("gte,em->gtm", x, self.merger_in[...]) + self.merger_in_bias[...]
            x = jax.nn.gelu(x, approximate=False)
            return product("gtm,md->gtd", x, self.merger_out[...]) + self.merger_out_bias[...]


class VisionTower(Merger):
    """Patch embedding, blocks, and the mergers: the tower's own of the last block's output, and DeepStack's of some blocks before."""

    def __init__(self, config: VisionConfig, declare: Declare):
        c, e = config, config.hidden_size
        self.patch_embed = declare((c.patch_features, e), ("patch", "embed"), fan_in(-2))
        self.patch_embed_bias = declare((e,), ("norm",), zeros) if c.patch_bias else None
        self.positions = declare((c.position_grid**2, e), ("patch", "embed"), fan_in(-1)) if c.position_grid else None
        self.blocks: Any = nnx.List([VisionBlock(c, declare) for _ in range(c.depth)])
        super().__init__(c, declare)
        self.deepstack: Any = nnx.List([Merger(c, declare, joined_norm=True) for _ in c.deepstack_blocks]) if c.deepstack_blocks else None

    def __call__(self, frames: UInt8[Array, "B F 3 height width"]) -> Features:
        """Of a clip's C = ceil(F / 2) * height * width / merged patch tokens, in the order (grid, row, column)."""
        c, (batch, _, _, height, width) = self.config, frames.shape
        order = window_order(c, height, width)
        with jax.named_scope("patchify"):
            patches = patchify(c, frames).astype(self.patch_embed.dtype)[:, order.source]
        x = jnp.einsum("gpf,fe->gpe", patches, self.patch_embed[...])
        if self.patch_embed_bias is not None:
            x = x + self.patch_embed_bias[...]
        if self.positions is not None:
            size = (height // c.patch_size, width // c.patch_size)
            x = x + stretched(self.positions[...], *size, c.spatial_merge_size)[order.source]
        x = x.reshape(x.shape[0], order.windows, order.window_patches, -1)
        rotation = Rotation(*(a.reshape(*x.shape[1:3], 1, -1) for a in order.rotation))
        valid = None if order.valid.all() else jnp.asarray(order.valid)
        deep = []
        for index, block in enumerate(self.blocks):
            x = _block(block, x, rotation, valid, full=c.sees_all(index))
            if index in c.deepstack_blocks:
                deep.append(self.deepstack[len(deep)].merge(x, order.restore))
        clips = (merged.reshape(batch, -1, c.out_hidden_size) for merged in (self.merge(x, order.restore), *deep))
        return Features(next(clips), tuple(clips))
