"""The decoder of Qwen2, Qwen2.5 and Qwen3. A layer knows nothing of positions, masks or caches: its caller hands it `attend`.

Query, key and value weights are one array, grouped by key-value head (G query heads, one key, one value), and gate
and up projections are another: one product each while decoding, and a tensor axis shards both without a seam.
Products carry names, by which `training.remat` chooses what the backward pass keeps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from svlm_jax.config import TextConfig
from svlm_jax.model.layers import Declare, fan_in, ones, rms_norm, zeros
from svlm_jax.model.quantized import product as weight_product
from svlm_jax.model.quantized import rows
from svlm_jax.types import Array, Float, Int

Product = Callable[[str, str, Array, Any], Array]  # the weight's name, an einsum, what goes in, the weight
Attend = Callable[
    [Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]],
    Float[Array, "B T N H"],
]


def plain_product(name: str, spec: str, x: Array, weight: Any) -> Array:
    """A layer's product as it is; `training.lora` adds to some of them by name."""
    return weight_product(spec, x, weight)


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, each behind a norm and around a residual."""

    def __init__(self, config: TextConfig, declare: Declare):
        c, groups = config, config.num_attention_heads // config.num_key_value_heads
        self.config = config
        d, f, k, h = c.hidden_size, c.intermediate_size, c.num_key_value_heads, c.head_dim or 0
        self.attention_norm = declare((d,), ("norm",), ones)
        self.qkv = declare((d, k, groups + 2, h), ("embed", "kv_heads", None, "head_dim"), fan_in(-4))
        self.qkv_bias = declare((k, groups + 2, h), ("kv_heads", None, "head_dim"), zeros) if c.qkv_bias else None
        self.query_norm = declare((h,), ("norm",), ones) if c.qk_norm else None
        self.key_norm = declare((h,), ("norm",), ones) if c.qk_norm else None
        self.out = declare((k, groups, h, d), ("kv_heads", None, "head_dim", "embed"), fan_in(-4, -3, -2))
        self.mlp_norm = declare((d,), ("norm",), ones)
        self.gate_up = declare((d, 2, f), ("embed", None, "mlp"), fan_in(-3))
        self.down = declare((f, d), ("mlp", "embed"), fan_in(-2))

    def __call__(self, x: Float[Array, "B T D"], attend: Attend, product: Product = plain_product) -> Float[Array, "B T D"]:
        epsilon = self.config.rms_norm_eps
        batch, length, _ = x.shape
        with jax.named_scope("attention"):
            y = rms_norm(x, self.attention_norm[...], epsilon)
            qkv = product("qkv", "btd,dkch->btkch", y, self.qkv[...])
            qkv = checkpoint_name(qkv if self.qkv_bias is None else qkv + self.qkv_bias[...], "qkv")
            q, key, value = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
            if self.query_norm is not None and self.key_norm is not None:
                q, key = rms_norm(q, self.query_norm[...], epsilon), rms_norm(key, self.key_norm[...], epsilon)
            heads = attend(q.reshape(batch, length, -1, q.shape[-1]), key, value).reshape(batch, length, -1)
            # One contracted axis: over three, the compiler transposes the weights before every product
            heads = checkpoint_name(heads, "heads")
            x = x + checkpoint_name(product("out", "btn,nd->btd", heads, self.out[...].reshape(heads.shape[-1], -1)), "out")
        with jax.named_scope("mlp"):
            y = rms_norm(x, self.mlp_norm[...], epsilon)
            gate_up = checkpoint_name(product("gate_up", "btd,dcf->btcf", y, self.gate_up[...]), "gate_up")
            y = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
            return x + product("down", "btf,fd->btd", y, self.down[...])


class Decoder(nnx.Module):
    """Token embedding, layers, final norm and head (none where the embedding is tied)."""

    def __init__(self, config: TextConfig, declare: Declare, *, stacked: bool):
        c = config
        self.config = config
        self.embedding = declare((c.vocab_size, c.hidden_size), ("vocab", "embed"), fan_in(-1))
        self.layers: Any = (
            DecoderLayer(c, declare.stacked(c.num_hidden_layers))
            if stacked
            else nnx.List([DecoderLayer(c, declare) for _ in range(c.num_hidden_layers)])
        )
        self.norm = declare((c.hidden_size,), ("norm",), ones)
        if not c.tie_word_embeddings:
            self.head = declare((c.hidden_size, c.vocab_size), ("embed", "vocab"), fan_in(-2))

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return rows(self.embedding[...], tokens, self.norm[...].dtype)

    def ends(self) -> tuple[Array, Any]:
        """The final norm's weights and the head's, which are the embedding's where it is tied."""
        return self.norm[...], (self.embedding if self.config.tie_word_embeddings else self.head)[...]

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of the last layer's output."""
        return word_logits(self.config, self.ends(), x)


def word_logits(config: TextConfig, ends: tuple[Array, Any], x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 logits of the last layer's output, by the weights of `Decoder.ends`."""
    norm, head = ends
    with jax.named_scope("head"):
        x = rms_norm(x, norm, config.rms_norm_eps)
        spec = "...d,vd->...v" if config.tie_word_embeddings else "...d,dv->...v"
        return weight_product(spec, x, head, jnp.float32)
