"""Kernels for H100s in JAX's interpreter of GPUs, with races detected. It comes with jax 0.11.

The interpreter has no product of a matrix in registers: that instruction is replaced by what it means, in the decoding kernel alone.
"""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("jax's interpreter of GPUs comes with 0.11", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the only place that says whether there was a race
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from test_products import KINDS, expect_equal, operands
from test_ring_attention import direct, eight, inputs, split

from svlm_jax.kernels.products import mosaic_gpu as products
from svlm_jax.kernels.products.api import product
from svlm_jax.kernels.products.mosaic_gpu_kernel import BIASES, placed_bits
from svlm_jax.kernels.ring_attention import mosaic_gpu_decode
from svlm_jax.kernels.ring_attention.api import ring_attention


@contextlib.contextmanager
def interpreted():
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
        yield
    assert not gpu_callbacks.get_races().races_found


class _Over(types.SimpleNamespace):
    """A module with some of its names replaced."""

    def __init__(self, base, **names):
        super().__init__(_base=base, **names)

    def __getattr__(self, name):
        return getattr(self._base, name)

    def __call__(self, *args):
        return self._base(*args)


@pytest.fixture
def register_products(monkeypatch):
    """`pl.run_state(body)(ACC.init(sums))`, whose body multiplies registers by a tile and adds that to the sums."""
    plgpu, pl, acc = (getattr(mosaic_gpu_decode, name) for name in ("plgpu", "pl", "ACC"))

    def wgmma(sums, a, b):
        if not isinstance(sums, list):
            return plgpu.wgmma(sums, a, b)
        sums[0] += jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    def run_state(body):
        def run(value):
            sums = [value]
            body(sums)
            return sums[0]

        return run

    replaced = {"plgpu": _Over(plgpu, wgmma=wgmma), "pl": _Over(pl, run_state=run_state), "ACC": _Over(acc, init=lambda value: value)}
    for name, value in replaced.items():
        monkeypatch.setattr(mosaic_gpu_decode, name, value)
    mosaic_gpu_decode.decode.clear_cache()
    yield
    mosaic_gpu_decode.decode.clear_cache()  # what was traced is not what runs elsewhere


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize(
    ("regions", "fill"), [(((0, 128), (128, 256), (256, 640)), 0.5), (((0, 0), (0, 128), (128, 256), (256, 512)), 0.01)]
)
def test_ring_decoding(register_products, regions, fill, kv):
    arrays = inputs(30, batch=2, length=2, head_dim=128, regions=regions, fill=fill, dtype=jnp.bfloat16)
    arrays = eight(arrays) if kv else arrays
    positional, fresh = split(arrays)
    with interpreted():
        out, lse = jax.block_until_ready(ring_attention(*positional, regions=regions, backend="mosaic_gpu", **fresh))
    true_out, true_lse = direct(*positional, regions=regions, **fresh)
    np.testing.assert_allclose(np.asarray(out, np.float64), true_out, atol=0.01, rtol=0.01)  # bfloat16
    np.testing.assert_allclose(lse, true_lse, atol=1e-4)


@pytest.mark.parametrize(
    ("blocks", "rows", "inputs", "outputs", "kind"),
    [
        (6, (9,), 384, (2, 128), "fp8_products"),
        (6, (3, 1), 512, (3, 128), "int8"),  # shares that begin and end within a tile of outputs
        (2, (2, 4), 256, (256,), "fp8"),
        (14, (32,), 384, (512,), "int8"),  # as many blocks as there are tiles, and no more
        (264, (1,), 128, (128,), "fp8"),
    ],
)
def test_products_of_few_rows(monkeypatch, blocks, rows, inputs, outputs, kind):
    monkeypatch.setattr(products, "MULTIPROCESSORS", blocks // products.RESIDENT)
    narrow = kind == "fp8_products"
    x, values, scale = operands(7, rows, inputs, outputs, "fp8" if narrow else kind)
    weight = jnp.moveaxis(values, 0, -1) if narrow else values
    with interpreted():
        found = [np.asarray(product(x, weight, scale, narrow=narrow, backend="mosaic_gpu")) for _ in range(2)]
    expect_equal(found[0], x, values, scale)
    np.testing.assert_array_equal(*found)


def numbers(kind):
    """All that eight bits can say, in a row; zeros in the place of what is no number."""
    codes = np.arange(256).astype(np.uint8)
    return np.where(np.isnan(codes.view(kind).astype(np.float32)), 0, codes).astype(np.uint8).view(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_eight_bits_is_converted_exactly(kind):
    """Each row of x takes one row of the weight as it is. A CPU takes subnormal bfloat16 for zeros, which GPUs do not: those are looked at below."""
    row = numbers(jnp.dtype(KINDS[kind]))
    row = np.where(np.abs(row.astype(np.float32)) < 2.0**-6, np.zeros_like(row), row) if kind == "fp8" else row
    values = jnp.asarray(np.tile(row, (128, 1)))
    with interpreted():
        found = product(jnp.eye(2, 128, 5, jnp.bfloat16), values, jnp.ones(256), backend="mosaic_gpu")
    assert len(np.unique(found[0])) > 200
    np.testing.assert_array_equal(found, np.asarray(values[:2], np.float32))


def test_bits_of_eight_bit_floats_are_placed_exactly():
    row = numbers(np.dtype(jnp.float8_e4m3fn))
    placed = np.asarray(placed_bits(row.view(np.int8).astype(np.int16)), np.int16).view(jnp.bfloat16)
    np.testing.assert_array_equal(placed.astype(np.float64) * BIASES, row.astype(np.float64))
    assert (np.signbit(placed.astype(np.float64)) == np.signbit(row.astype(np.float64))).all()
