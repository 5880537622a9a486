"""Products of many rows in eight bits on both sides, at the rate that matrix units have for them: the rows are rounded as the weight was.

What is left of a row and an output are their scales, which leave the sum. Both operands lie with their inputs last, as the matrix units of
GPUs read eight bits: of a weight that lies otherwise a compiler would make a turned copy every time.
"""

import jax
import jax.numpy as jnp

from svlm_jax.kernels.backends import Unsupported
from svlm_jax.kernels.products.reference import many_rows, rounded_rows


def check(x: jax.Array, values: jax.Array, *, narrow: bool) -> None:
    """Unsupported names the reason."""
    if not narrow:
        raise Unsupported("takes weights that are for rows in eight bits")
    many_rows(x)


def product_fp8(x: jax.Array, values: jax.Array, scale: jax.Array, *, narrow: bool = True) -> jax.Array:
    """See `api.product`. Sums are rounded to x's type before they are scaled: the product of a long chunk is written in half the bytes."""
    rounded, of_rows = rounded_rows(x)
    last = rounded.ndim - 1, values.ndim - 1

    def sums(precision):
        def call(rounded, values):
            dimensions = (last[:1], last[1:]), ((), ())
            return jax.lax.dot_general(rounded, values, dimensions, precision=precision, preferred_element_type=x.dtype)

        return call

    # A GPU's fast sums of eight bits keep 14 bits of what float32 would
    found = jax.lax.platform_dependent(rounded, values, cuda=sums(jax.lax.Precision.HIGHEST), default=sums(None))
    return found.astype(jnp.float32) * jnp.expand_dims(of_rows, range(of_rows.ndim, found.ndim)) * scale
