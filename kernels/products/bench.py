"""Measures products with weights in eight bits on this machine's accelerator: correct first, then time, each backend beside XLA's own product
and beside XLA's with the same weight in bfloat16.

A program goes through several weights of one shape, so that none is found in a cache of the chip, and each product's input depends on what
the one before gave, through one small sum. Time is the median of the programs' wall time over the number of weights.
"""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.backends import Unsupported
from svlm_jax.kernels.bench import relative_error
from svlm_jax.kernels.products.api import backends, product
from svlm_jax.kernels.products.reference import FEW_ROWS

KINDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "fp8_products": jnp.float8_e4m3fn}
WEIGHTS = {  # of Qwen2.5-VL-7B's decoder: inputs, outputs
    "qkv": (3584, 4608),
    "out": (3584, 3584),
    "gate_up": (3584, 37_888),
    "down": (18_944, 3584),
    "head": (3584, 152_064),
}
CHAIN_BYTES = 256 << 20  # of the weights of a program, at least: several times what a chip's cache holds
REPEATS = 20


def make_weight(key: jax.Array, inputs: int, outputs: int, kind: str) -> tuple[jax.Array, jax.Array]:
    """Random numbers of eight bits, and scales near those of a weight whose outputs are about as large as its inputs."""
    first, second = jax.random.split(key)
    shape = (outputs, inputs) if kind == "fp8_products" else (inputs, outputs)
    if kind == "int8":
        values = jax.random.randint(first, shape, -127, 128, jnp.int8)
    else:
        values = jax.random.normal(first, shape, jnp.bfloat16).astype(KINDS[kind])
    return values, jax.random.uniform(second, (outputs,), jnp.float32, 0.5, 1.5) / (math.sqrt(inputs) * (74.0 if kind == "int8" else 1.0))


def microseconds(call: Callable, x: jax.Array, weights: list) -> float:
    """Median time of one product."""

    @jax.jit
    def program(x, weights):
        for weight in weights:
            x = x + (jnp.mean(call(x, *weight)) * 1e-6).astype(x.dtype)
        return x

    jax.block_until_ready(program(x, weights))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(x, weights))
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / len(weights) * 1e6


def measure(weight: str, *, rows: int, kind: str) -> dict[str, object]:
    """One product: errors, times and rates of every backend that takes it, and of XLA's with the weight in bfloat16."""
    inputs, outputs = WEIGHTS[weight]
    size, narrow = inputs * outputs, kind == "fp8_products"
    x = jax.random.normal(jax.random.key(1), (rows, inputs), jnp.bfloat16)
    make = jax.jit(make_weight, static_argnums=(1, 2, 3))
    weights = [make(jax.random.key(index), inputs, outputs, kind) for index in range(max(2, -(-CHAIN_BYTES // size)))]
    values, scale = weights[0]
    with jax.default_matmul_precision("highest"):
        truth = jax.jit(functools.partial(product, narrow=narrow, backend="reference"))(x.astype(jnp.float32), values, scale)
    record: dict[str, object] = {"weight": weight, "rows": rows, "inputs": inputs, "outputs": outputs, "kind": kind}
    record["narrow"] = narrow and rows > FEW_ROWS  # operations in eight bits
    record |= {"operations": 2.0 * rows * size, "bytes": size + 4.0 * outputs + 2.0 * rows * (inputs + 2 * outputs)}
    for name in backends(jax.devices()[0].platform):
        if name == "fp8" and not narrow:
            continue
        call = functools.partial(product, narrow=narrow, backend=name)
        try:
            found, again = (jax.jit(call)(x, values, scale) for _ in range(2))
        except Unsupported as reason:
            record[name] = {"unsupported": str(reason)}
            continue
        assert bool(jnp.array_equal(found, again)), f"{name}: two runs differ in their bits"
        record[name] = {"us": microseconds(call, x, weights), "relative_error": relative_error(found, truth)}
    turn = jnp.transpose if narrow else lambda values: values
    wide = [(turn(values).astype(jnp.bfloat16),) for values, _ in weights[: max(2, -(-CHAIN_BYTES // (2 * size)))]]
    del weights
    record["XLA bf16"] = {"us": microseconds(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32), x, wide), "bytes": 2.0 * size}
    return record
