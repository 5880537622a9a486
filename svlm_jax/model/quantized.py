"""Weights in eight bits: int8 or float8_e4m3fn numbers, and one float32 scale for every output channel.

A product multiplies by the numbers as they are, converted where they are read, and scales its output: no copy of the weight in a
wider type is made, so a decoding step reads half the bytes of bfloat16. What goes in and comes out, and the cache, stay as they were.
With "fp8_products" the rows of prefill and vision are rounded on their way into a product as well, which then works at the rate of eight bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from svlm_jax.errors import UserError
from svlm_jax.kernels.products.api import product as eight_bit_product
from svlm_jax.types import Array, Params

KINDS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}  # the type, and the largest number that is used of it
NARROW = {"fp8_products": "fp8"}  # with rows in eight bits too: how the weights are kept
PARTS = ("decoder", "head", "vision")
LAYER = ("qkv", "out", "gate_up", "down")  # products of a decoder layer, and of a block of the vision tower
MERGER = ("merger_in", "merger_out")
Path_ = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What of a model is kept in eight bits. By default what every decoding step reads; with rows in eight bits, all that can be."""

    kind: str
    parts: tuple[str, ...] = None  # type: ignore[assignment]  # the default is known where the kind is

    def __post_init__(self):
        if self.kind not in (*KINDS, *NARROW):
            raise UserError(f"weights cannot be quantized to {self.kind!r}: the kinds are {', '.join((*KINDS, *NARROW))}")
        if self.parts is None:
            object.__setattr__(self, "parts", PARTS if self.narrow_rows else PARTS[:2])
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise UserError(f"{unknown[0] if unknown else 'no part'!r} cannot be quantized: the parts are {', '.join(PARTS)}")

    @property
    def stored(self) -> str:
        """One of `KINDS`."""
        return NARROW.get(self.kind, self.kind)

    @property
    def narrow_rows(self) -> bool:
        """Whether the rows of prefill and vision are multiplied in eight bits too."""
        return self.kind in NARROW

    def narrow(self, path: Path_) -> bool:
        """Whether a weight is for such rows: those of a head are few."""
        return self.narrow_rows and path[-1] in (*LAYER, *MERGER)

    def inputs(self, path: Path_, ndim: int, *, tied: bool) -> tuple[int, ...] | None:
        """The axes that products sum over, for a weight that is quantized; None for any other parameter.

        Args:
          path: of the parameter in the tree.
          tied: whether the embedding is the head too.
        """
        tower, name = path[0], path[-1]
        if tower == "vision":
            chosen = "vision" in self.parts and (name in LAYER if path[1] == "blocks" else name in MERGER)
        elif path[1] == "layers":
            chosen = "decoder" in self.parts and name in LAYER
        else:
            chosen = "head" in self.parts and name == ("embedding" if tied else "head")
        if not chosen:
            return None
        first = 1 if path[:2] == ("text", "layers") and len(path) == 3 else 0  # stacked layers
        if name == "embedding":
            return (1,)
        return tuple(range(first, ndim - 1)) if name == "out" else (first,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """One weight. Stands in the parameter tree where the array stood; also holds shapes, or shardings, of the two."""

    values: Any  # in the weight's shape; `narrow`: what is summed over comes last
    scale: Any  # float32, in the shape of the axes that are not summed over
    narrow: bool = dataclasses.field(default=False, metadata={"static": True})  # many rows are rounded to eight bits for it

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        shape, kept = self.values.shape, self.scale.ndim
        return (*shape[kept:], *shape[:kept]) if self.narrow else shape

    def __getitem__(self, index: Any) -> "Quantized":
        """All of it, as modules ask for their parameters: `weight[...]`."""
        assert index is ..., "a quantized weight is used whole"
        return self

    def reshape(self, *shape: int) -> "Quantized":
        """The axes that are summed over as one; the last one stays."""
        shape = (*self.scale.shape, shape[0]) if self.narrow else shape
        return dataclasses.replace(self, values=self.values.reshape(*shape))


def product(spec: str, x: Array, weight: Any, out_dtype: Any = None) -> Array:
    """An einsum of activations and a weight, plain or quantized, whose result ends in the weight's output axes in their order.

    Args:
      out_dtype: of the sum and of the result; None: as `jnp.einsum` has it.
    """
    if not isinstance(weight, Quantized):
        return jnp.einsum(spec, x, weight, preferred_element_type=out_dtype)
    if _is_plain(spec):
        out = eight_bit_product(x, weight.values, weight.scale, narrow=weight.narrow)
    else:
        assert not weight.narrow, f"{spec} is no plain product"
        out = jnp.einsum(spec, x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32) * weight.scale
    return out.astype(out_dtype or x.dtype)


@functools.lru_cache(maxsize=64)
def _is_plain(spec: str) -> bool:
    """Whether x's last axis meets the weight's first one, and no other axis changes its place."""
    x, weight, out = spec.replace("->", ",").split(",")
    return x[-1] == weight[0] and out == x[:-1] + weight[1:]


def rows(embedding: Any, index: Array, dtype: Any) -> Array:
    """Rows of an embedding, plain or quantized (which happens to one that is the head too)."""
    if not isinstance(embedding, Quantized):
        return embedding[index]
    return (embedding.values[index].astype(jnp.float32) * embedding.scale[index][..., None]).astype(dtype)


def as_quantization(asked: str | Quantization | None) -> Quantization | None:
    """A kind alone stands for the default parts."""
    return Quantization(asked) if isinstance(asked, str) else asked


@functools.partial(jax.jit, static_argnames=("kind", "axes"))
def _quantize(weight: Array, kind: str, axes: tuple[int, ...]) -> Quantized:
    dtype, limit = KINDS[kind]
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / limit)
    values = wide / scale
    values = jnp.round(values) if jnp.issubdtype(dtype, jnp.integer) else values
    return Quantized(values.astype(dtype), jnp.squeeze(scale, axes))


def quantize_weight(weight: Array, kind: str, axes: tuple[int, ...], *, narrow: bool = False) -> Quantized:
    """A weight whose products sum over `axes`; it stays on its devices, cut as it was."""
    found = _quantize(weight, kind, axes)
    if isinstance(weight.sharding, NamedSharding):
        found = jax.device_put(found, cut(weight.sharding, axes, weight.ndim))
    return narrowed(found, axes) if narrow else found


def narrowed(weight: Quantized, axes: tuple[int, ...]) -> Quantized:
    """The weight for rows in eight bits."""
    values, scale = weight.values, weight.scale
    pinned = isinstance(values.sharding, NamedSharding)
    places = cut(values.sharding, axes, values.ndim, narrow=True).values if pinned else None
    return Quantized(jax.jit(_last, static_argnums=1, out_shardings=places)(values, axes), scale, narrow=True)


def _last(values: Array, axes: tuple[int, ...]) -> Array:
    """With the axes that are summed over last."""
    return jnp.moveaxis(values, axes, range(values.ndim - len(axes), values.ndim))


def cut(sharding: NamedSharding, axes: tuple[int, ...], ndim: int, *, narrow: bool = False) -> Quantized:
    """How a quantized weight is cut: as the weight was, and its scale as the output axes were."""
    spec = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    kept = tuple(axis for index, axis in enumerate(spec) if index not in axes)
    whole = (*kept, *(spec[index] for index in axes)) if narrow else sharding.spec
    values, scale = (NamedSharding(sharding.mesh, PartitionSpec(*names), memory_kind=sharding.memory_kind) for names in (whole, kept))
    return Quantized(values, scale, narrow)


def _map(
    params: Params, quantization: Quantization, change: Callable[[Any, tuple[int, ...], bool], Any], ndim: Callable[[Any], int]
) -> Params:
    """The tree with `change(leaf, axes, narrow)` in place of every weight that is quantized."""
    tied = "head" not in params["text"]

    def walk(node: Any, path: Path_) -> Any:
        if isinstance(node, dict):
            return {key: walk(child, (*path, key)) for key, child in node.items()}
        axes = quantization.inputs(path, ndim(node), tied=tied)
        return node if axes is None else change(node, axes, quantization.narrow(path))

    return walk(params, ())


def is_quantized(params: Params) -> bool:
    """Whether any weight is."""
    return any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized)))


def quantize(params: Params, quantization: Quantization) -> Params:
    """Parameters, plain before, with the chosen weights in eight bits."""

    def change(weight: Array, axes: tuple[int, ...], narrow: bool) -> Quantized:
        return quantize_weight(weight, quantization.stored, axes, narrow=narrow)

    return _map(params, quantization, change, lambda leaf: leaf.ndim)


def parts_of(paths: Iterable[Path_]) -> tuple[str, ...]:
    """The parts of a model that these parameters belong to."""
    found = {"vision" if path[0] == "vision" else "decoder" if path[1] == "layers" else "head" for path in paths}
    return tuple(part for part in PARTS if part in found)


def quantized_shapes(shapes: Params, quantization: Quantization | None) -> Params:
    """Of `quantize`, from the parameters' shapes."""
    if quantization is None:
        return shapes

    def shape(leaf: jax.ShapeDtypeStruct, axes: tuple[int, ...], narrow: bool) -> Quantized:
        kept = tuple(size for axis, size in enumerate(leaf.shape) if axis not in axes)
        whole = (*kept, *(leaf.shape[axis] for axis in axes)) if narrow else leaf.shape
        dtype, _ = KINDS[quantization.stored]
        return Quantized(jax.ShapeDtypeStruct(whole, dtype), jax.ShapeDtypeStruct(kept, jnp.float32), narrow)

    return _map(shapes, quantization, shape, lambda leaf: leaf.ndim)


def quantized_shardings(shardings: Params, quantization: Quantization | None) -> Params:
    """How `quantize` cuts what is cut by these shardings, whose specs name every axis."""
    if quantization is None:
        return shardings
    return _map(shardings, quantization, lambda s, axes, narrow: cut(s, axes, len(s.spec), narrow=narrow), lambda s: len(s.spec))
