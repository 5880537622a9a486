"""The contract of products with weights in eight bits, run against every backend that runs here, and lowering for the GPU's."""

import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from svlm_jax.kernels.backends import Unsupported, _log_once
from svlm_jax.kernels.products.api import BACKENDS, product
from svlm_jax.model.quantized import Quantized
from svlm_jax.model.quantized import product as weight_product

HERE = ("reference", "tiles")  # the GPU's kernel is in test_mosaic_gpu.py
KINDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def operands(seed, rows, inputs, outputs, kind, dtype=jnp.bfloat16):
    r = np.random.default_rng(seed)
    values = jnp.asarray(r.integers(-127, 128, (inputs, *outputs)), jnp.float32).astype(KINDS[kind])
    return jnp.asarray(r.normal(size=(*rows, inputs)), dtype), values, jnp.asarray(r.random(outputs), jnp.float32)


def direct(x, values, scale):
    return np.tensordot(np.asarray(x, np.float64), np.asarray(values.astype(jnp.float32), np.float64), 1) * np.asarray(scale, np.float64)


def expect_equal(ours, x, values, scale):
    """Products of bfloat16 and eight bits are exact in float32: what is left is the rounding of sums."""
    true = direct(x, values, scale)
    assert ours.dtype == jnp.float32 and ours.shape == true.shape
    np.testing.assert_allclose(ours, true, rtol=0, atol=2e-6 * np.abs(true).max())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [((1, 1), 256, (128,)), ((40,), 384, (2, 320)), ((2, 33), 640, (3, 5, 4)), ((), 16, (24,))]
)
def test_equals_the_equation(backend, kind, rows, inputs, outputs):
    arrays = operands(1, (33, *rows) if backend == "tiles" else rows, inputs, outputs, kind)
    expect_equal(jax.jit(lambda *a: product(*a, backend=backend))(*arrays), *arrays)


def test_tiles_are_cut_along_the_longer_side(monkeypatch):
    from svlm_jax.kernels.products import reference

    monkeypatch.setattr(reference, "TILE_BYTES", 100_000)
    for inputs, outputs in ((256, 1000), (1000, 256)):
        arrays = operands(2, (40,), inputs, (outputs,), "int8")
        expect_equal(product(*arrays, backend="tiles"), *arrays)
        sizes = [
            eqn.invars[1].aval.shape
            for eqn in jax.make_jaxpr(reference.product_in_tiles)(*arrays).eqns
            if eqn.primitive.name == "dot_general"
        ]
        assert len(sizes) == 4 and max(2 * rows * columns for rows, columns in sizes) <= 2 * 256 * 256


def test_a_zero_scale_is_a_zero_output():
    x, values, scale = operands(3, (4,), 128, (128,), "int8")
    assert not np.asarray(product(x, values, scale.at[7].set(0)))[:, 7].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 64)}, "do not belong together"),
        ({"scale": (64,)}, "do not belong together"),
        ({"dtype": jnp.bfloat16}, "not in eight bits"),
        ({"narrow": True}, "for rows in eight bits is of float8_e4m3fn, not int8"),
        ({"narrow": True, "scale": (64,)}, "do not belong together"),
    ],
)
def test_broken_contracts_are_named(change, message):
    x, values, scale = operands(4, (4,), 128, (128,), "int8")
    x, scale = jnp.zeros(change.get("x", x.shape), x.dtype), jnp.zeros(change.get("scale", scale.shape))
    with pytest.raises(ValueError, match=message):
        product(x, values.astype(change.get("dtype", values.dtype)), scale, narrow=change.get("narrow", False))


def test_backends_say_why_they_do_not_take_a_call(caplog):
    assert BACKENDS == ("mosaic_gpu", "tiles", "fp8", "reference")
    for arrays, reason in (
        (operands(5, (1,), 128, (128,), "int8", jnp.float32), "bfloat16, not float32"),
        (operands(5, (33,), 128, (128,), "int8"), "1 to 32 rows, not 33"),
        (operands(5, (1,), 130, (128,), "int8"), "multiples of 128 and 128, not 130 and 128"),
    ):
        with pytest.raises(Unsupported, match=reason):
            product(*arrays, backend="mosaic_gpu")
    x, values, scale = operands(5, (33,), 128, (128,), "fp8")
    for narrow, backend, reason in ((True, "tiles", "rounds no rows"), (False, "fp8", "weights that are for rows in eight bits")):
        with pytest.raises(Unsupported, match=reason):
            product(x, values.T if narrow else values, scale, narrow=narrow, backend=backend)
    with pytest.raises(Unsupported, match="more than 32 rows, not 32"):
        product(x[:32], values.T, scale, narrow=True, backend="fp8")
    _log_once.cache_clear()
    with pytest.raises(Unsupported, match="more than 32 rows, not 31"), caplog.at_level(logging.INFO):
        x, values, scale = operands(5, (31,), 128, (384,), "int8", jnp.float32)
        product(x, values, scale)
        product(x, values, scale, backend="tiles")
    said = [record.getMessage() for record in caplog.records if "product:" in record.getMessage()]
    assert len(said) == len(set(said)) == 3 and all("not taken" in line for line in said)


@pytest.mark.parametrize(("kind", "narrow"), [("int8", False), ("fp8", False), ("fp8", True)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3584, (4, 9, 128)), (32, 18944, (3584,))])
def test_the_kernel_lowers_for_gpus_at_7b_sizes(rows, inputs, outputs, kind, narrow):
    whole = (*outputs, inputs) if narrow else (inputs, *outputs)
    shapes = jax.ShapeDtypeStruct((rows, 1, inputs), jnp.bfloat16), jax.ShapeDtypeStruct(whole, KINDS[kind])
    traced = jax.jit(lambda *a: product(*a, narrow=narrow)).trace(*shapes, jax.ShapeDtypeStruct(outputs, jnp.float32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("backend", ["fp8", "reference"])
@pytest.mark.parametrize(("rows", "outputs", "dtype"), [((40,), (2, 320), jnp.float32), ((3, 17), (24,), jnp.bfloat16)])
def test_rows_in_eight_bits_equal_the_equation(backend, rows, outputs, dtype):
    """By NumPy's own rounding to eight bits; a row of zeros, and rows far from one."""
    x, values, scale = operands(8, rows, 384, outputs, "fp8", dtype)
    x = (x * 10.0 ** jnp.linspace(-6, 6, rows[-1])[:, None]).at[..., 5, :].set(0).astype(dtype)
    wide = np.asarray(x, np.float32)
    of_rows = np.maximum(np.abs(wide).max(-1, keepdims=True), np.float32(1e-30)) * np.float32(1 / 448)
    true = direct((wide / of_rows).astype(ml_dtypes.float8_e4m3fn), values, scale)
    turned = jnp.moveaxis(values, 0, -1)
    ours = jax.jit(lambda *a: product(*a, narrow=True, backend=backend))(x, turned, scale)
    assert ours.dtype == jnp.float32 and ours.shape == true.shape
    ours = np.asarray(ours, np.float64) / of_rows.reshape(*rows, *(1,) * len(outputs))
    # Sums of a chunk in bfloat16 are rounded once before they are scaled
    np.testing.assert_allclose(ours, true, rtol=2.0**-8 if backend == "fp8" and dtype == jnp.bfloat16 else 0, atol=2e-6 * np.abs(true).max())
    assert not ours[..., 5, :].any() if len(outputs) == 1 else not ours[5].any()


def test_few_rows_of_a_weight_for_rows_in_eight_bits_stay_as_they_are():
    x, values, scale = operands(9, (4, 8), 384, (2, 320), "fp8")
    expect_equal(product(x, jnp.moveaxis(values, 0, -1), scale, narrow=True), x, values, scale)


@pytest.mark.parametrize(("inputs", "outputs"), [(3584, (2, 18944)), (18944, (3584,)), (1280, (2, 3420))])
def test_a_prefill_in_eight_bits_multiplies_both_sides_as_they_are(inputs, outputs):
    shapes = jax.ShapeDtypeStruct((1, 768, inputs), jnp.bfloat16), jax.ShapeDtypeStruct((*outputs, inputs), KINDS["fp8"])
    traced = jax.jit(lambda *a: product(*a, narrow=True)).trace(*shapes, jax.ShapeDtypeStruct(outputs, jnp.float32))
    lowered = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu")}
    whole = "x".join(map(str, (*outputs, inputs)))
    for platform, precision in (("cuda", "HIGHEST"), ("tpu", "DEFAULT")):
        (dot,) = (line for line in lowered[platform].splitlines() if "stablehlo.dot_general" in line)
        assert f"tensor<1x768x{inputs}xf8E4M3FN>, tensor<{whole}xf8E4M3FN>" in dot and f"precision = [{precision}, {precision}]" in dot
        assert dot.endswith("xbf16>") and lowered[platform].count(f"tensor<{whole}x") == lowered[platform].count(f"tensor<{whole}xf8E4M3FN>")


def test_what_a_prefill_runs_on_a_gpu_holds_no_wide_weight():
    """On a GPU alone: the compiler for TPUs reads a weight in eight bits as it is, and cuts it as the mesh has it."""
    shapes = jax.ShapeDtypeStruct((768, 3584), jnp.bfloat16), jax.ShapeDtypeStruct((3584, 2, 18944), jnp.int8)
    traced = jax.jit(product).trace(*shapes, jax.ShapeDtypeStruct((2, 18944), jnp.float32))
    gpu, tpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "tpu"))
    assert "tensor<3584x37888xbf16>" not in gpu and "tensor<3584x2x18944xbf16>" not in gpu
    assert gpu.count("stablehlo.dot_general") == 9 and tpu.count("stablehlo.dot_general") == 1


def test_einsums_that_are_no_plain_product_stay_einsums():
    """A tied embedding as the head: the weight's last axis is summed over."""
    x, values, scale = operands(6, (2,), 96, (64,), "int8", jnp.float32)
    ours = weight_product("...d,vd->...v", x, Quantized(values.T, scale), jnp.float32)
    expect_equal(ours, x, values, scale)
    np.testing.assert_array_equal(weight_product("td,dv->tv", x, Quantized(values, scale), jnp.float32), product(x, values, scale))
