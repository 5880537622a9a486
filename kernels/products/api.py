"""Products of activations with weights in eight bits: the contract, and the choice of a backend."""

import importlib
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from svlm_jax.kernels.backends import Backend, choose, names_on
from svlm_jax.kernels.products import fp8
from svlm_jax.kernels.products.reference import check_tiles, product_in_tiles, product_reference

log = logging.getLogger(__name__)
KINDS = (jnp.int8, jnp.float8_e4m3fn)


def product(x: jax.Array, values: jax.Array, scale: jax.Array, *, narrow: bool = False, backend: str | None = None) -> jax.Array:
    """x times a weight whose numbers have one scale for every output.

    Args:
      x: [..., inputs]; the axes before are rows.
      values: int8 or float8_e4m3fn [inputs, ...]; converted to x's type where they are read, which is exact in bfloat16.
      scale: float32 [...], of the outputs, which may be several axes.
      narrow: `values` is float8_e4m3fn [..., inputs], and where there are more than 32 rows these are rounded to float8_e4m3fn too, each by
        a scale of its own, for a product in eight bits.
      backend: a name in `BACKENDS`; None takes the first that accepts the call.

    Returns:
      float32, the axes of the rows before those of the outputs.

    Raises:
      ValueError: shapes or types that break the contract.
      Unsupported: `backend` does not take this call; the message says why.
    """
    outputs = values.shape[:-1] if narrow else values.shape[1:]
    if not x.ndim or not values.ndim or x.shape[-1] != values.shape[-1 if narrow else 0] or scale.shape != outputs:
        raise ValueError(f"x {x.shape}, weight {values.shape} and scale {scale.shape} do not belong together")
    if narrow and values.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"a weight for rows in eight bits is of float8_e4m3fn, not {values.dtype}")
    if values.dtype not in KINDS:
        raise ValueError(f"a weight of {values.dtype} is not in eight bits: {' and '.join(jnp.dtype(kind).name for kind in KINDS)} are")
    if backend is None:
        call = choose(log, "product", _BACKENDS, x, values, narrow=narrow)
    else:
        _BACKENDS[backend].check(x, values, narrow=narrow)
        call = _BACKENDS[backend].call
    with jax.named_scope("product"):
        return call(x, values, scale, narrow=narrow)


def _late(name: str) -> Callable:
    """A function of the GPU's backend, imported where it is called: it pulls in its own part of Pallas."""
    return lambda *args, **how: getattr(importlib.import_module("svlm_jax.kernels.products.mosaic_gpu"), name)(*args, **how)


# In the order in which they are tried
_BACKENDS = {
    "mosaic_gpu": Backend("cuda", _late("check"), _late("product_mosaic_gpu")),
    "tiles": Backend("cuda", check_tiles, product_in_tiles),
    "fp8": Backend(None, fp8.check, fp8.product_fp8),
    "reference": Backend(None, lambda x, values, narrow: None, product_reference),
}
BACKENDS = tuple(_BACKENDS)


def backends(platform: str) -> tuple[str, ...]:
    """Those that run on a platform, as devices name it: "cpu", "gpu" or "tpu"."""
    return names_on(_BACKENDS, platform)
