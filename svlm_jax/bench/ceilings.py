"""What this device can do at best: a large copy and large matrix products, measured in the run that is judged by them."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from svlm_jax.types import Array

BATCHES = 7


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of the device, in units of 1e12."""

    copy_tbps: float  # bytes read and written a second by a device copy
    matmul_tflops: float  # a square bfloat16 product of random numbers; a multiply-add is two operations
    fp8_tflops: float | None = None  # the same product of float8_e4m3fn; None: not measured, and not looked at

    def times(self, devices: int) -> "Ceilings":
        """Of so many devices together, if nothing had to be sent."""
        fp8 = None if self.fp8_tflops is None else self.fp8_tflops * devices
        return Ceilings(self.copy_tbps * devices, self.matmul_tflops * devices, fp8)


def measure(*, fp8: bool = False) -> Ceilings:
    """Runs all on the default device: 1 GiB and 8192^3 on an accelerator, 64 MiB and 512^3 on a CPU. Frees what it allocates.

    Args:
      fp8: whether the rate of products in eight bits is measured too.
    """
    small = jax.devices()[0].platform == "cpu"
    words, side, calls = (1 << 24, 512, 4) if small else (1 << 28, 8192, 20)

    copy = jax.jit(lambda x: x + 1)  # a bare copy would be left out by the compiler
    x = jnp.zeros(words, jnp.int32)
    seconds = _seconds(lambda: copy(x), calls)
    copy_tbps = 2 * x.nbytes / seconds / 1e12

    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    seconds = _seconds(lambda: product(a, b), calls)
    matmul_tflops = 2 * side**3 / seconds / 1e12
    if not fp8:
        return Ceilings(copy_tbps, matmul_tflops)
    a, b = a.astype(jnp.float8_e4m3fn), b.astype(jnp.float8_e4m3fn)
    # Inputs last in both, as GPUs read eight bits
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16))
    return Ceilings(copy_tbps, matmul_tflops, 2 * side**3 / _seconds(lambda: product(a, b), calls) / 1e12)


def _seconds(call: Callable[[], Array], calls: int) -> float:
    """Of one call among many that are enqueued at once; the median of several batches."""
    call().block_until_ready()
    batches = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        last.block_until_ready()
        batches.append((time.perf_counter() - start) / calls)
    return statistics.median(batches)
