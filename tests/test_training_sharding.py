"""The step on two or four devices is the step on one, whichever axes the mesh has; and what kernels are told of segments."""


import jax.numpy as jnp
import numpy as np
import pytest
import small_training
from devices import on_four_devices
from jax.sharding import AbstractMesh

from svlm_jax.configs.models import qwen2_5_vl_7b
from svlm_jax.errors import UserError
from svlm_jax.sharding import MESH_AXES
from svlm_jax.training.attention import Job, choose, segment_bounds

SHARDED = """
import dataclasses
import jax, numpy as np
from small_training import batch, config, start, trainer
from svlm_jax.sharding import make_mesh

def run(**axes):
    made = trainer(config(), mesh=make_mesh(**axes))
    state = start(made)
    gradients, sums = jax.jit(made.gradients)(state, jax.device_put(batch(), made.recipe.placement.batch(batch())))
    return state, gradients, sums

_, wanted, sums = run()
alone = [{axis: 2} for axis in ("data", "fsdp", "sequence", "tensor")]
for axes in (*alone, {"data": 2, "fsdp": 2}, {"sequence": 2, "tensor": 2}):
    state, found, found_sums = run(**axes)
    down = state.trained["text.layers.down"]
    pieces = axes.get("fsdp", 1) * axes.get("tensor", 1)
    assert len(down.sharding.device_set) == 2 ** len(axes) and down.addressable_shards[0].data.size == down.size // pieces, down.sharding
    assert state.moments[1].nu["text.layers.down"].sharding == down.sharding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), (found, found_sums), (wanted, sums))
"""


def test_two_and_four_devices_compute_what_one_does():
    on_four_devices(SHARDED)


def test_rows_that_do_not_divide():
    mesh = AbstractMesh((8, 1, 5, 1), MESH_AXES)
    place = small_training.trainer(small_training.config()).recipe.placement
    with pytest.raises(UserError, match=r"4 rows a micro-batch do not divide by data x fsdp = 8 x 1: make rows a multiple of 8"):
        type(place)(mesh).check(rows=4, tokens=20)
    with pytest.raises(UserError, match=r"rows of 48 tokens do not divide by sequence = 5"):
        type(place)(mesh).check(rows=8, tokens=48)


def test_segments_as_cudnn_takes_them():
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8])
    lengths, starts = segment_bounds(segments, 3)
    np.testing.assert_array_equal(lengths, [[3, 1, 2], [8, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(starts, [[0, 3, 4, -1], [0, -1, -1, -1], [-1, -1, -1, -1]])


def job(platform, *, dtype="bfloat16", tokens=20_480, **axes):
    mesh = AbstractMesh(tuple(axes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    return Job(qwen2_5_vl_7b(), mesh, platform, tokens, 8, jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("name", "where", "why"),
    [
        ("splash", job("cpu"), "it is for TPUs, and this is a cpu"),
        ("splash", job("tpu", tokens=20_000), "rows of 20000 tokens do not divide by 128 x sequence = 1"),
        ("splash", job("tpu", tensor=8), "4 key-value heads do not divide by tensor = 8"),
        ("cudnn", job("tpu"), "it is for NVIDIA GPUs, and this is a tpu"),
        ("cudnn", job("gpu", dtype="float32"), "it computes in bfloat16 or float16, not float32"),
        ("cudnn", job("gpu", sequence=2), "its packed rows cannot be cut by sequence = 2"),
    ],
)
def test_why_an_attention_cannot_serve(name, where, why):
    with pytest.raises(UserError) as error:
        choose(name, where)
    assert str(error.value) == f"attention {name!r} cannot serve here: {why}"


def test_the_first_that_serves():
    assert choose("auto", job("tpu")).name == "splash"
    assert choose("auto", job("gpu")).name == "cudnn"
    found = choose("auto", job("gpu", dtype="float32"))
    assert found.name == "xla"
    assert found.rejected == (
        "splash: it is for TPUs, and this is a gpu",
        "cudnn: it computes in bfloat16 or float16, not float32",
    )
    with pytest.raises(UserError, match="attention 'flash' is unknown: auto, splash, cudnn, xla"):
        choose("flash", job("cpu"))
