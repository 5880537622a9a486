"""The contract of ring attention, run against every backend that runs on this machine, and lowering for the others.

The TPU's kernel runs in JAX's interpreter of TPUs: memory that nothing was written to holds NaN, and races are detected.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_four_devices
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only place that says whether there was a race
from jax.experimental.pallas import tpu as pltpu

from svlm_jax.kernels.backends import Unsupported
from svlm_jax.kernels.ring_attention.api import BACKENDS, prepare, ring_attention
from svlm_jax.kernels.ring_attention.int8 import Int8Rows, quantize_rows, widen
from svlm_jax.kernels.ring_attention.tiles import visited_tiles


def direct(q, k, v, valid, *, regions, self_k=None, self_v=None, self_valid=None, scale=None):
    """The equation itself in float64, one query of one head at a time."""
    q, k, v = np.asarray(q, np.float64), *(np.asarray(widen(a, jnp.float32), np.float64) for a in (k, v))
    batch, _, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out, lse = np.zeros((batch, length, heads, head_dim)), np.full((batch, length, heads), -np.inf)
    for b, t, n in np.ndindex(batch, length, heads):
        kv = n // (heads // k.shape[1])
        scores = np.concatenate([k[b, kv, start:stop] @ q[b, r, t, n] for r, (start, stop) in enumerate(regions)])
        scores, values = scores[np.asarray(valid[b])], v[b, kv][np.asarray(valid[b])]
        if self_k is not None:
            sees = np.flatnonzero(np.asarray(self_valid[b]) & (np.arange(length) <= t))
            scores = np.concatenate([scores, np.asarray(self_k[b, kv], np.float64)[sees] @ q[b, -1, t, n]])
            values = np.concatenate([values, np.asarray(self_v[b, kv], np.float64)[sees]])
        if len(scores):
            peak = scores.max() * scale
            weights = np.exp(scores * scale - peak)
            lse[b, t, n] = peak + np.log(weights.sum())
            out[b, t, n] = weights @ values / weights.sum()
    return out, lse


REGIONS = ((0, 128), (128, 256), (256, 640))
HEAD_DIMS = {"reference": 16, "mosaic_tpu": 128}  # of the backends that run here


@pytest.fixture(params=HEAD_DIMS)
def backend(request):
    return request.param


@contextlib.contextmanager
def on(backend):
    """Where a backend runs."""
    if backend != "mosaic_tpu":
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


def inputs(seed, *, batch=3, length=1, heads=4, kv_heads=2, head_dim=16, regions=REGIONS, dtype=jnp.float32, fill=0.5, fresh=True):
    r = np.random.default_rng(seed)
    slots = regions[-1][1]

    def normal(*shape):
        return jnp.asarray(r.normal(size=shape), dtype)

    arrays = {
        "q": normal(batch, len(regions), length, heads, head_dim),
        "k": normal(batch, kv_heads, slots, head_dim),
        "v": normal(batch, kv_heads, slots, head_dim),
        "valid": jnp.asarray(r.random((batch, slots)) < fill),
    }
    if fresh:
        arrays |= {
            "self_k": normal(batch, kv_heads, length, head_dim),
            "self_v": normal(batch, kv_heads, length, head_dim),
            "self_valid": jnp.asarray(r.random((batch, length)) < 0.8),
        }
    return arrays


def eight(arrays):
    """The same with the cache's keys and values in eight bits."""
    return arrays | {name: quantize_rows(arrays[name]) for name in ("k", "v")}


def split(arrays):
    positional = [arrays[name] for name in ("q", "k", "v", "valid")]
    return positional, {name: value for name, value in arrays.items() if name.startswith("self_")}


@functools.cache
def jitted(regions, backend, scale):
    return jax.jit(functools.partial(ring_attention, regions=regions, backend=backend, scale=scale))


def run(arrays, backend, *, regions=REGIONS, scale=None):
    positional, fresh = split(arrays)
    with on(backend):
        return jax.block_until_ready(jitted(regions, backend, scale)(*positional, **fresh))


def expect_equal(arrays, backend, *, regions=REGIONS, tolerance=2e-5, scale=None):
    positional, fresh = split(arrays)
    out, lse = run(arrays, backend, regions=regions, scale=scale)
    true_out, true_lse = direct(*positional, regions=regions, scale=scale, **fresh)
    np.testing.assert_allclose(np.asarray(out, np.float64), true_out, atol=tolerance, rtol=tolerance)
    assert np.array_equal(np.isneginf(lse), np.isneginf(true_lse))
    np.testing.assert_allclose(lse, true_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("length", "fresh"), [(1, True), (1, False), (20, True)])
@pytest.mark.parametrize("fill", [0.0, 0.02, 0.5, 1.0])
def test_equals_the_equation(backend, length, fill, fresh):
    expect_equal(inputs(length, length=length, fill=fill, fresh=fresh, head_dim=HEAD_DIMS[backend]), backend)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (3, 3)])
def test_groups_of_heads(backend, heads, kv_heads):
    expect_equal(inputs(3, heads=heads, kv_heads=kv_heads, head_dim=HEAD_DIMS[backend]), backend)


@pytest.mark.parametrize("regions", [((0, 0),), ((0, 0), (0, 384), (384, 384), (384, 1408))])
def test_an_empty_region(backend, regions):
    expect_equal(inputs(12, regions=regions, head_dim=HEAD_DIMS[backend]), backend, regions=regions)


def test_one_region_and_a_scale(backend):
    expect_equal(inputs(4, regions=((0, 640),), head_dim=HEAD_DIMS[backend]), backend, regions=((0, 640),), scale=0.5)


def test_a_single_valid_slot_and_streams_of_different_fill(backend):
    arrays = inputs(5, fresh=False, head_dim=HEAD_DIMS[backend])
    valid = np.zeros((3, 640), bool)
    valid[0, 300], valid[1, 100:500] = True, True  # the third stream holds nothing
    expect_equal(arrays | {"valid": jnp.asarray(valid)}, backend)


# Keys and values in eight bits are what the numbers and scales say, and no backend may add more error to them than to others


@pytest.mark.parametrize(("length", "fresh", "fill"), [(20, True, 0.5), (1, False, 0.02)])
def test_int8_equals_the_equation(backend, length, fresh, fill):
    expect_equal(eight(inputs(20, length=length, fill=fill, fresh=fresh, head_dim=HEAD_DIMS[backend])), backend)


def test_int8_in_many_regions_under_bfloat16_queries(backend):
    regions = ((0, 0), (0, 384), (384, 512), (512, 1408))
    arrays = inputs(21, heads=7, kv_heads=1, regions=regions, dtype=jnp.bfloat16, head_dim=HEAD_DIMS[backend])
    expect_equal(eight(arrays), backend, regions=regions, tolerance=0.01)


def test_int8_over_no_cache_at_all(backend):
    expect_equal(eight(inputs(22, length=4, regions=((0, 0),), head_dim=HEAD_DIMS[backend])), backend, regions=((0, 0),))


def test_invalid_int8_slots_may_hold_anything(backend):
    arrays = eight(inputs(23, head_dim=HEAD_DIMS[backend]))
    lost = ~arrays["valid"][:, None]
    poisoned = {
        name: Int8Rows(jnp.where(lost[..., None], 127, arrays[name].values).astype(jnp.int8), jnp.where(lost, 1e30, arrays[name].scale))
        for name in ("k", "v")
    }
    for ours, theirs in zip(run(arrays, backend), run(arrays | poisoned, backend), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_in_eight_bits_are_near_what_they_were_made_of():
    rows = np.random.default_rng(0).normal(size=(2, 3, 5, 64)).astype(np.float32) * np.array([1e-20, 1, 1e4])[:, None, None]
    rows[0, 1, 2] = 0
    small = quantize_rows(jnp.asarray(rows, jnp.float32))
    assert small.values.dtype == jnp.int8 and small.scale.shape == (2, 3, 5) and np.abs(np.asarray(small.values, np.int32)).max() == 127
    largest = np.abs(rows).max(-1, keepdims=True)
    assert (np.abs(np.asarray(widen(small, jnp.float32)) - rows) <= largest * 1.0001 / 254).all()


def test_order_of_slots_means_nothing(backend):
    arrays = inputs(6, regions=((0, 640),), fill=0.3, head_dim=HEAD_DIMS[backend])
    order = np.random.default_rng(0).permutation(640)
    shuffled = arrays | {"k": arrays["k"][:, :, order], "v": arrays["v"][:, :, order], "valid": arrays["valid"][:, order]}
    for ours, theirs in zip(*(run(a, backend, regions=((0, 640),), scale=0.5) for a in (arrays, shuffled)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_invalid_slots_may_hold_anything(backend):
    arrays = inputs(7, head_dim=HEAD_DIMS[backend])
    poison = jnp.where(arrays["valid"][:, None, :, None], 0.0, 1e30)
    poisoned = run(arrays | {"k": arrays["k"] + poison, "v": arrays["v"] + poison}, backend)
    for ours, theirs in zip(run(arrays, backend), poisoned, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_same_bits_every_time(backend):
    arrays = inputs(8, batch=8, heads=7, kv_heads=1, dtype=jnp.bfloat16, head_dim=HEAD_DIMS[backend])
    for first, second in zip(run(arrays, backend), run(arrays, backend), strict=True):
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


def test_bfloat16(backend):
    expect_equal(inputs(14, batch=8, heads=7, kv_heads=1, dtype=jnp.bfloat16, head_dim=HEAD_DIMS[backend]), backend, tolerance=0.01)


def test_a_plan_made_once_changes_nothing(backend):
    arrays = inputs(15, head_dim=HEAD_DIMS[backend])
    positional, fresh = split(arrays)

    @jax.jit
    def planned(*positional, **fresh):
        plan = prepare(positional[-1], regions=REGIONS)
        return ring_attention(*positional, regions=REGIONS, backend=backend, plan=plan, **fresh)

    with on(backend):
        found = jax.block_until_ready(planned(*positional, **fresh))
    for ours, theirs in zip(run(arrays, backend), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_tiles_of_queries_change_nothing(monkeypatch):
    from svlm_jax.kernels.ring_attention import reference

    arrays = inputs(9, length=48)
    whole = run(arrays, "reference")
    monkeypatch.setattr(reference, "SCORE_BYTES", 100_000)
    for ours, theirs in zip(whole, run(arrays, "reference", scale=16**-0.5), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_round_in_tiles_on_a_tpu():
    """Many tiles of queries over many blocks of the cache and two of the chunk, the second stream's cache almost empty."""
    regions = ((0, 640), (640, 1152), (1152, 2176))
    arrays = inputs(16, batch=2, length=768, heads=7, kv_heads=1, head_dim=128, regions=regions)
    arrays["valid"] &= (jnp.arange(2176) < 700) | (jnp.arange(2) == 0)[:, None]
    for ours, theirs in zip(run(arrays, "mosaic_tpu", regions=regions), run(arrays, "reference", regions=regions), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)


def test_blocks_without_a_valid_slot_are_skipped():
    from svlm_jax.kernels.ring_attention import mosaic_tpu

    regions = ((0, 640), (640, 1152), (1152, 15_360))
    block, starts, owners, inside = mosaic_tpu.cache_blocks(regions)
    assert (block, len(starts), owners.tolist()) == (1024, 16, [0, 1, *[2] * 14])
    covered = np.zeros(15_360, np.int32)
    for start, counts in zip(starts, inside, strict=True):
        covered[start * 128 : start * 128 + block] += counts
    assert (covered == 1).all()
    valid = np.zeros((3, 15_360), bool)
    valid[0, [700, 15_359]], valid[1, :] = True, True
    order, count, held = mosaic_tpu.prepare(jnp.asarray(valid), regions)
    assert count.tolist() == [2, 16, 0] and held.sum(axis=(1, 2, 3)).tolist() == [2, 15_360, 0]
    assert order.tolist() == [[1] + [15] * 15, list(range(16)), [0] * 16]


def test_scores_stay_small_at_full_size():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    slots, length = 15_104, 768
    call = functools.partial(ring_attention, regions=((0, 640), (640, 1152), (1152, slots)), backend="reference")
    args = (shape((1, 3, length, 28, 128)), shape((1, 4, slots, 128)), shape((1, 4, slots, 128)), jax.ShapeDtypeStruct((1, slots), bool))
    fresh = {
        "self_k": shape((1, 4, length, 128)),
        "self_v": shape((1, 4, length, 128)),
        "self_valid": jax.ShapeDtypeStruct((1, length), bool),
    }
    compiled = jax.jit(call).lower(*args, **fresh).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * (512 << 20)


def test_visited_tiles():
    valid = np.zeros((2, 640), bool)
    valid[0, [5, 300, 639]], valid[1, 130] = True, True
    tiles, first = visited_tiles(jnp.asarray(valid), REGIONS)
    assert first.tolist() == [[0, 1, 1, 3], [0, 0, 1, 1]]
    assert tiles[0, :3].tolist() == [0, 2, 4] and tiles[1, :1].tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": ((0, 128), (128, 640))}, "3 rotated copies for 2 regions"),
        ({"regions": ((0, 100), (100, 256), (256, 640))}, "multiples of 128"),
        ({"self_valid": None}, "self_valid"),
        ({"v": None}, "keys are float32 and values are int8"),
    ],
)
def test_broken_contracts_are_named(change, message):
    arrays = inputs(10)
    if "v" in change:
        arrays, change = arrays | {"v": quantize_rows(arrays["v"])}, {}
    positional, fresh = split(arrays)
    with pytest.raises(ValueError, match=message):
        ring_attention(*positional, **({"regions": REGIONS} | fresh | change))


def test_a_backend_that_does_not_take_the_call_says_why():
    positional, fresh = split(inputs(11))
    with pytest.raises(Unsupported, match="bfloat16 over bfloat16 or int8, not float32 queries"):
        ring_attention(*positional, regions=REGIONS, backend="mosaic_gpu", **fresh)
    assert BACKENDS[-1] == "reference"


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize(
    ("length", "streams", "regions"),
    [
        *((length, streams, ((0, 640), (640, 1152), (1152, 15_360))) for length, streams in [(1, 1), (8, 1), (1, 8), (768, 1)]),
        (1, 1, ((0, 640), (640, 1152), (1152, 2048), (2048, 15_360))),  # four copies of the query fit into shared memory too
    ],
)
def test_gpu_kernels_lower_without_a_gpu(length, streams, regions, kv):
    """At 7B sizes and the default windows."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    cache, fresh = shape((streams, 4, 15_360, 128)), shape((streams, 4, length, 128))
    if kv:
        cache = jax.eval_shape(quantize_rows, cache)
    call = functools.partial(ring_attention, regions=regions, backend="mosaic_gpu")
    args = (shape((streams, len(regions), length, 28, 128)), cache, cache, jax.ShapeDtypeStruct((streams, 15_360), bool))
    traced = jax.jit(call).trace(*args, self_k=fresh, self_v=fresh, self_valid=jax.ShapeDtypeStruct((streams, length), bool))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def decode_in_numpy(shapes, q, k, v, hidden, tiles, first, *scales):
    """What the decoding kernel leaves for the host's side to join, share by share."""
    assert bool(scales) == shapes.eight == (k.dtype == jnp.int8)
    if scales:
        k, v = (widen(Int8Rows(rows, scale), jnp.float32) for rows, scale in zip((k, v), scales, strict=True))
    q, k, v, hidden, tiles, first = (np.asarray(a, np.float64 if a.dtype != jnp.int32 else np.int32) for a in (q, k, v, hidden, tiles, first))
    shares = (shapes.batch, shapes.kv_heads, shapes.splits, shapes.rows)
    sums, peak, total = np.zeros((*shares, shapes.head_dim)), np.full(shares, -1e29), np.zeros(shares)
    for b, h, split in np.ndindex(shares[:3]):
        count = first[b, -1]
        share = -(-count // shapes.splits)
        for index in range(min(split * share, count), min((split + 1) * share, count)):
            slots = np.arange(128) + tiles[b, index] * 128
            region = np.searchsorted(first[b, 1:-1], index, side="right")
            scores = q[b, h, region, : shapes.rows] @ k[b, h, slots].T * shapes.scale * np.log2(np.e) + hidden[b, slots]
            highest = np.maximum(peak[b, h, split], scores.max(1))
            decay, weights = np.exp2(peak[b, h, split] - highest), np.exp2(scores - highest[:, None])
            sums[b, h, split] = sums[b, h, split] * decay[:, None] + weights @ v[b, h, slots]
            total[b, h, split] = total[b, h, split] * decay + weights.sum(1)
            peak[b, h, split] = highest
    return tuple(jnp.asarray(a, jnp.float32) for a in (sums, peak, total))


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize(("length", "fill", "fresh"), [(1, 0.5, True), (3, 0.5, True), (1, 0.02, False), (2, 0.0, True), (1, 0.0, False)])
def test_shares_of_the_decoding_kernel_are_joined(monkeypatch, length, fill, fresh, kv):
    from svlm_jax.kernels.ring_attention import mosaic_gpu_decode

    monkeypatch.setattr(mosaic_gpu_decode, "decode", decode_in_numpy)
    arrays = inputs(13, length=length, head_dim=64, fill=fill, fresh=fresh, dtype=jnp.bfloat16)
    arrays = eight(arrays) if kv else arrays
    positional, new = split(arrays)
    out, lse = ring_attention(*positional, regions=REGIONS, backend="mosaic_gpu", **new)
    true_out, true_lse = direct(*positional, regions=REGIONS, **new)
    np.testing.assert_allclose(np.asarray(out, np.float64), true_out, atol=0.01, rtol=0.01)  # bfloat16
    np.testing.assert_allclose(lse, true_lse, atol=1e-4)


ON_FOUR_DEVICES = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from svlm_jax.kernels.ring_attention.api import prepare, ring_attention
from svlm_jax.kernels.ring_attention.int8 import quantize_rows
from svlm_jax.kernels.ring_attention.mesh import over_mesh
from svlm_jax.kernels.ring_attention.reference import ring_attention_reference
from svlm_jax.sharding import make_mesh
from test_ring_attention import REGIONS, inputs

mesh, heads, streams = make_mesh(data=2, tensor=2), ("data", "tensor"), ("data",)
cuts = {"q": ("data", None, None, "tensor"), "k": heads, "v": heads, "valid": streams, "self_k": heads, "self_v": heads, "self_valid": streams}

def local(*arrays, plan, **static):
    assert all(a.shape[:2] == (1, 2) for a in jax.tree.leaves(arrays[1]))
    assert plan[0].shape[0] == 1, "each device has one of two streams and two of four heads"
    return ring_attention_reference(*arrays, **static)

@jax.jit
def call(arrays):
    plan = prepare(arrays["valid"], regions=REGIONS)["mosaic_tpu"]
    return over_mesh(local, *(arrays[name] for name in cuts), plan=plan, regions=REGIONS)

def put(arrays):
    return {name: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*cuts[name]))) for name, a in arrays.items()}

arrays = inputs(1, batch=2, heads=8, kv_heads=4, length=2)
found = call(put(arrays))
assert found[0].sharding.spec == PartitionSpec("data", None, "tensor"), found[0].sharding
assert "all-gather" not in call.lower(put(arrays)).compile().as_text()
for ours, theirs in zip(found, ring_attention(*list(arrays.values())[:4], regions=REGIONS, self_k=arrays["self_k"], self_v=arrays["self_v"],
                                              self_valid=arrays["self_valid"], backend="reference"), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)

narrow = arrays | {name: quantize_rows(arrays[name]) for name in ("k", "v")}  # a scale is cut as its rows are
found = call(put(narrow))
assert found[0].sharding.spec == PartitionSpec("data", None, "tensor") and "all-gather" not in call.lower(put(narrow)).compile().as_text()
for ours, theirs in zip(found, ring_attention(*list(narrow.values())[:4], regions=REGIONS, self_k=arrays["self_k"], self_v=arrays["self_v"],
                                              self_valid=arrays["self_valid"], backend="reference"), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)

@jax.jit
def two_layers(q, k, v, valid, self_k, self_v, self_valid):
    plan = prepare(valid, regions=REGIONS)
    fresh = {"self_k": self_k, "self_v": self_v, "self_valid": self_valid}
    for _ in range(2):
        q += ring_attention(q, k, v, valid, regions=REGIONS, plan=plan, **fresh)[0][:, None]
    return q

small = put(inputs(1, batch=2, heads=8, kv_heads=4, length=2, head_dim=128, dtype=jnp.bfloat16))
lowered = two_layers.trace(*small.values()).lower(lowering_platforms=("cuda",)).as_text()
assert "mosaic_gpu" in lowered and "manual_computation" in lowered and lowered.count('"stablehlo.sort"') == 1
"""


def test_streams_and_heads_are_cut_over_a_mesh():
    """And a plan that is made once is one sort, however many layers the GPU's kernels have."""
    on_four_devices(ON_FOUR_DEVICES)
