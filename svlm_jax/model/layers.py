"""What both towers are made of: parameters stated on one line, and norms.

A parameter line gives shape, logical axes and initialiser; `svlm_jax.sharding` maps logical axes to mesh axes.
With `stack=L` every parameter of a layer gets a leading "layers" axis: one stacked layer instead of L separate ones.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from svlm_jax.types import Array, Float

Initializer = Callable[[Any, tuple[int, ...], Any], Array]
zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()


def fan_in(*axes: int) -> Initializer:
    """Normal with variance 1 / (size of the input axes, counted without a stack axis from the right: negative numbers)."""

    def init(key, shape, dtype):
        size = 1
        for axis in axes:
            size *= shape[axis]
        return (jax.random.normal(key, shape, jnp.float32) * size**-0.5).astype(dtype)

    return init


class Declare:
    """Makes the parameters of one module: `declare(shape, axes, init)`. Without a `key` they are shapes: nothing is drawn or traced."""

    def __init__(self, key: Array | None, dtype: Any, stack: int | None = None, count: Iterator[int] | None = None):
        self.key, self.dtype, self.stack = key, dtype, stack
        self.count = itertools.count() if count is None else count  # of the parameters so far, each of which has a key of its own

    def __call__(self, shape: Sequence[int], axes: Sequence[str | None], init: Initializer) -> nnx.Param:
        assert len(shape) == len(axes), (shape, axes)
        if self.stack is not None:
            shape, axes = (self.stack, *shape), ("layers", *axes)
        if self.key is None:
            return nnx.Param(jax.ShapeDtypeStruct(tuple(shape), self.dtype), axes=tuple(axes))
        return nnx.Param(init(jax.random.fold_in(self.key, next(self.count)), tuple(shape), self.dtype), axes=tuple(axes))

    def stacked(self, count: int) -> "Declare":
        return Declare(self.key, self.dtype, count, self.count)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], epsilon: float) -> Float[Array, "... D"]:
    """x / rms(x) * weight; the statistics in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight


def layer_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], bias: Float[Array, "D"], epsilon: float) -> Float[Array, "... D"]:
    """(x - mean) / deviation * weight + bias; the statistics in float32 (arXiv 1607.06450)."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight + bias


def once(body: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """`body(module, *arrays, **static)` as a function that is traced and lowered once for all layers of one shape.

    Layers in a list are the same program over other arrays: without this, tracing a deep model takes longer than compiling it.
    """

    @functools.partial(jax.jit, static_argnames=("graphdef", *static))
    def traced(graphdef, weights, *arrays, **settings):
        return body(nnx.merge(graphdef, weights), *arrays, **settings)

    def call(module, *arrays, **settings):
        graphdef, weights = nnx.split(module)
        return traced(graphdef, weights, *arrays, **settings)

    return call


def take_layer(layers: Any, index: int) -> Any:
    """Layer `index` of a stacked module, or of a list of modules."""
    if isinstance(layers, nnx.List):
        return layers[index]
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))


def run_layers(
    layers: Any, count: int, body: Callable[[Any, Array], Array], x: Array, *, added: Sequence[Array] = (), remat: bool = False
) -> Array:
    """x through `count` layers: `lax.scan` over a stacked module, a Python loop over a list.

    Args:
      added: to what the first layers put out, an array a layer.
    """
    if isinstance(layers, nnx.List):
        for index, layer in enumerate(layers):
            x = (nnx.remat(body) if remat else body)(layer, x)
            x = x + added[index] if index < len(added) else x
        return x
    graphdef, state = nnx.split(layers)
    steps = jnp.stack([*added, jnp.zeros_like(x)]) if added else None

    def step(carry, inputs):
        layer_state, index = inputs
        carry = body(nnx.merge(graphdef, layer_state), carry)
        return carry if steps is None else carry + steps[jnp.minimum(index, len(added))], None

    x, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, x, (state, jnp.arange(count)), length=count)
    return x
