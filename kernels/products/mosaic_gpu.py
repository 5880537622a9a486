"""Mosaic GPU backend, host side: which products it takes, how they are shared out, and how what blocks leave is joined."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.backends import Unsupported
from svlm_jax.kernels.products.reference import one_device

MULTIPROCESSORS, RESIDENT = 132, 2  # of an H100, and blocks on each, while shared memory lasts: one converts while the other multiplies
MOST_ROWS = 32


def check(x: jax.Array, values: jax.Array, *, narrow: bool) -> None:
    """Unsupported names the reason."""
    from svlm_jax.kernels.products.mosaic_gpu_kernel import INPUTS, OUTPUTS

    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"takes bfloat16, not {x.dtype}")
    one_device(values)
    rows, inputs = math.prod(x.shape[:-1]), x.shape[-1]
    outputs = math.prod(values.shape[:-1] if narrow else values.shape[1:])
    if not 1 <= rows <= MOST_ROWS:
        raise Unsupported(f"takes 1 to {MOST_ROWS} rows, not {rows}")
    if inputs % INPUTS or outputs % OUTPUTS or not inputs * outputs:
        raise Unsupported(f"takes inputs and outputs in multiples of {INPUTS} and {OUTPUTS}, not {inputs} and {outputs}")


@functools.lru_cache(maxsize=64)
def _left_by(shapes) -> tuple[np.ndarray, np.ndarray]:
    """For every tile of outputs, the entries of [blocks * parts] that belong to it, in the order of blocks, and which of these exist."""
    found: list[list[int]] = [[] for _ in range(shapes.tiles // shapes.tall)]
    for block in range(shapes.blocks):
        start, stop = shapes.share(block)
        for part, tile in enumerate(range(start // shapes.tall, (stop - 1) // shapes.tall + 1)):
            found[tile].append(block * shapes.parts + part)
    most = max(map(len, found))
    padded = np.array([entries + [0] * (most - len(entries)) for entries in found], np.int32)
    return padded, np.array([[index < len(entries) for index in range(most)] for entries in found])


def product_mosaic_gpu(x: jax.Array, values: jax.Array, scale: jax.Array, *, narrow: bool = False) -> jax.Array:
    """See `api.product`."""
    from svlm_jax.kernels.products.mosaic_gpu_kernel import INPUTS, OUTPUTS, Shapes, multiply

    kept, cut = x.shape[:-1], scale.shape
    inputs, outputs = x.shape[-1], math.prod(cut)
    x, values = x.reshape(-1, inputs), values.reshape((outputs, inputs) if narrow else (inputs, outputs))
    rows = x.shape[0]
    shapes = Shapes(
        rows=-(-rows // 8) * 8,
        inputs=inputs,
        outputs=outputs,
        blocks=min(MULTIPROCESSORS * (RESIDENT if rows <= 24 else 1), inputs * outputs // (INPUTS * OUTPUTS)),
        stored=jnp.dtype(values.dtype),
        dtype=jnp.dtype(x.dtype),
        turned=narrow,
    )
    sums = multiply(shapes, jnp.pad(x, ((0, shapes.rows - rows), (0, 0))), values)
    entries, exist = _left_by(shapes)
    parts = jnp.where(exist[..., None, None], sums.reshape(-1, OUTPUTS, shapes.rows)[entries], 0.0)
    return jnp.sum(parts, axis=1).reshape(outputs, shapes.rows)[:, :rows].T.reshape(*kept, *cut) * scale
