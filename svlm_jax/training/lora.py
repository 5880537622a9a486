"""Low-rank adapters (LoRA, arXiv 2106.09685) on the products of decoder layers, and merging them into the weights.

A product x W becomes x W + (alpha / rank) x A B, with A [in, rank] drawn at random and B [rank, out] zero at first. What is added is
computed apart, in activations: added to a weight in bfloat16, the first thousand steps would be lost in its rounding.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params, logical_axes
from svlm_jax.training.trainable import Flat, flatten, matching
from svlm_jax.types import Array

LAYERS = "text.layers."
INPUTS = {"qkv": 1, "out": 3, "gate_up": 1, "down": 1}  # products of a layer: how many of the weight's axes are contracted


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Off at rank 0."""

    rank: int = 0
    alpha: float = 32.0
    on: tuple[str, ...] = ("text.layers.*",)  # patterns of parameters, of which products of layers are adapted

    def __post_init__(self):
        if self.rank < 0 or not self.alpha > 0:
            raise UserError(f"lora.rank {self.rank} must not be negative, and lora.alpha {self.alpha} must be positive")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """Name of a product: (A, B) of one layer, or [L, ...] of all. B is scaled already."""

    pairs: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def product(self, name: str, spec: str, x: Array, weight: Array) -> Array:
        """What `model.text.plain_product` computes, and the adapter's part where this product has one."""
        y = jnp.einsum(spec, x, weight)
        if name not in self.pairs:
            return y
        a, b = self.pairs[name]
        low = jnp.einsum("bti,ir->btr", x, a)
        return y + jnp.einsum("btr,ro->bto", low, b.reshape(b.shape[0], -1)).reshape(y.shape)


def _products(config: ModelConfig, lora: LoraConfig) -> list[str]:
    paths = list(flatten(abstract_params(config, stacked=True)))
    names = [path.removeprefix(LAYERS) for path in matching(paths, lora.on)]
    found = [name for name in names if name in INPUTS]
    if not found:
        raise UserError(f"lora.on = {', '.join(lora.on)} names no product of a layer: {', '.join(LAYERS + name for name in INPUTS)}")
    return found


def adapter_axes(config: ModelConfig, lora: LoraConfig) -> Flat:
    """Logical axes of each adapter, as `sharding` takes them; inputs of several axes are one here and stay whole."""
    layers, out = logical_axes(config, stacked=True)["text"]["layers"], {}
    for name in _products(config, lora):
        count = INPUTS[name]
        axes = layers[name][1:]
        out[f"{LAYERS}{name}.lora_a"] = ("layers", axes[0] if count == 1 else None, None)
        out[f"{LAYERS}{name}.lora_b"] = ("layers", None, *axes[count:])
    return out


def init_adapters(config: ModelConfig, lora: LoraConfig, key: Array) -> Flat:
    """Adapters that change nothing yet, float32."""
    layers, out = abstract_params(config, stacked=True)["text"]["layers"], {}
    for i, name in enumerate(_products(config, lora)):
        count, (stack, *shape) = INPUTS[name], layers[name].shape
        size = math.prod(shape[:count])
        noise = jax.random.normal(jax.random.fold_in(key, i), (stack, size, lora.rank), jnp.float32)
        out[f"{LAYERS}{name}.lora_a"] = noise * size**-0.5
        out[f"{LAYERS}{name}.lora_b"] = jnp.zeros((stack, lora.rank, *shape[count:]), jnp.float32)
    return out


def adapters_of(flat: Flat, lora: LoraConfig) -> tuple[Adapters, Flat]:
    """The adapters among flat parameters, and the other parameters."""
    rest = {path: leaf for path, leaf in flat.items() if ".lora_" not in path}
    names = [path.removeprefix(LAYERS).removesuffix(".lora_a") for path in flat if path.endswith(".lora_a")]
    pairs = {name: (flat[f"{LAYERS}{name}.lora_a"], flat[f"{LAYERS}{name}.lora_b"] * lora.scale) for name in names}
    return Adapters(pairs), rest


def merged(flat: Flat, lora: LoraConfig) -> Flat:
    """The parameters with their adapters added, computed in float32 and kept in each weight's type: a model like any other."""
    adapters, out = adapters_of(flat, lora)
    for name, (a, b) in adapters.pairs.items():
        weight = out[f"{LAYERS}{name}"]
        added = jnp.einsum("lir,lro->lio", a.astype(jnp.float32), b.astype(jnp.float32).reshape(*b.shape[:2], -1))
        out[f"{LAYERS}{name}"] = (weight.astype(jnp.float32) + added.reshape(weight.shape)).astype(weight.dtype)
    return out
