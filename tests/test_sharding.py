"""Meshes, the table from logical to mesh axes, and the arrays that come out of it."""

import dataclasses
import math

import jax
import pytest
from devices import on_four_devices
from jax.sharding import AbstractMesh, PartitionSpec

from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import MODELS, qwen2_5_vl_7b, tiny
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params, logical_axes
from svlm_jax.sharding import MESH_AXES, Rules, make_mesh, param_shardings, partition, replicated_axes, state_shardings
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.prompt import PromptLayout, time_capacity
from svlm_jax.streaming.state import state_shapes
from svlm_jax.tokenizer import Tokenizer


def abstract_mesh(**sizes: int):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_one_device_has_a_mesh_too():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_too_few_devices():
    with pytest.raises(UserError, match=r"tensor 4096 needs 4096 devices"):
        make_mesh(tensor=4096)
    with pytest.raises(UserError, match=r"mesh axis data must be at least 1, not 0"):
        make_mesh(data=0)


@pytest.mark.parametrize(("name", "stacked"), [("tiny", False), ("7b", False), *((name, True) for name in MODELS)])
def test_every_parameter_is_cut_evenly(name, stacked):
    config, mesh = MODELS[name](), abstract_mesh(fsdp=4, tensor=8)
    shardings = param_shardings(config, mesh, stacked=stacked)

    def check(leaf, sharding):
        assert len(sharding.spec) == len(leaf.shape)
        sharding.shard_shape(leaf.shape)  # raises where an axis does not divide

    jax.tree.map(check, abstract_params(config, stacked=stacked), shardings)


def test_specs_of_the_7b_model():
    specs = jax.tree.map(lambda s: s.spec, param_shardings(qwen2_5_vl_7b(), abstract_mesh(fsdp=2, tensor=4)))
    layer, block = specs["text"]["layers"][27], specs["vision"]["blocks"][0]
    assert specs["text"]["embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["text"]["head"] == PartitionSpec("fsdp", "tensor")
    assert layer["qkv"] == PartitionSpec("fsdp", "tensor", None, None)
    assert layer["out"] == PartitionSpec("tensor", None, None, "fsdp")
    assert layer["gate_up"] == PartitionSpec("fsdp", None, "tensor")
    assert layer["down"] == PartitionSpec("tensor", "fsdp")
    assert layer["attention_norm"] == PartitionSpec(None)
    assert block["qkv"] == PartitionSpec("fsdp", None, "tensor", None)
    stacked = param_shardings(qwen2_5_vl_7b(), abstract_mesh(fsdp=2, tensor=4), stacked=True)
    assert stacked["text"]["layers"]["down"].spec == PartitionSpec(None, "tensor", "fsdp")


def test_heads_that_do_not_divide_are_replicated_and_listed():
    config, mesh = qwen2_5_vl_7b(), abstract_mesh(tensor=8)
    layer = param_shardings(config, mesh)["text"]["layers"][0]
    assert layer["qkv"].spec == PartitionSpec("fsdp", None, None, None)
    assert layer["gate_up"].spec == PartitionSpec("fsdp", None, "tensor")
    assert "kv_heads: 4 is not a multiple of tensor = 8" in replicated_axes(config, mesh)
    assert replicated_axes(config, abstract_mesh(tensor=4)) == []


def test_one_mesh_axis_cannot_cut_two_axes():
    with pytest.raises(UserError, match=r"cut two axes of \('vocab', 'embed'\) by mesh axis 'tensor'"):
        param_shardings(tiny(), abstract_mesh(tensor=2), rules=dataclasses.replace(Rules(), embed="tensor"))


def test_a_mesh_axis_that_is_not_there():
    with pytest.raises(UserError, match=r"mesh axis 'expert', but the mesh has data, fsdp, sequence, tensor"):
        partition((4,), ("mlp",), abstract_mesh(), Rules(mlp="expert"))


def test_every_rule_is_used():
    used = {axis for leaf in jax.tree.leaves(logical_axes(tiny(), stacked=True), is_leaf=lambda x: isinstance(x, tuple)) for axis in leaf}
    assert {field.name for field in dataclasses.fields(Rules)} == used - {None} | {"streams"}


def test_states_are_cut_by_stream_and_head():
    tokenizer = Tokenizer.load(tiny_path())
    layout = PromptLayout.from_tokenizer(tokenizer)
    spec = StreamSpec(tiny(1024), StreamConfig(), layout, 56, 84, time_capacity(tokenizer), watch=(layout.im_end,))
    shapes = state_shapes(spec, streams=4)
    found = state_shardings(shapes, abstract_mesh(data=2, tensor=2))
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), shapes, found)
    assert found.k[1].spec == found.v[0].spec == PartitionSpec("data", "tensor", None, None)
    assert found.valid.spec == PartitionSpec("data", None)
    assert found.coordinates.spec == PartitionSpec("data", None, None)
    assert found.round.spec == PartitionSpec()
    found = state_shardings(shapes, abstract_mesh(data=3, tensor=4))  # neither divides
    assert found.k[0].spec == PartitionSpec(None, None, None, None)


SHARDED_FORWARD = """
import jax, numpy as np
from svlm_jax.configs.models import tiny
from svlm_jax.model.qwen_vl import forward, init_params
from svlm_jax.sharding import make_mesh, param_shardings
config = tiny(256)
mesh = make_mesh(fsdp=2, tensor=2)
shardings = param_shardings(config, mesh)
params = init_params(config, jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
positions = np.broadcast_to(np.arange(9)[None, :, None], (2, 9, 3)).astype(np.int32)
step = jax.jit(lambda params: forward(params, config, tokens, positions))
one = step(params)
sharded = jax.device_put(params, shardings)
assert sharded["text"]["layers"][0]["qkv"].addressable_shards[0].data.shape == (32, 1, 4, 16)
np.testing.assert_allclose(one, step(sharded), atol=2e-5)
"""


def test_the_forward_is_the_same_on_four_devices():
    on_four_devices(SHARDED_FORWARD)


def test_parameter_counts_are_the_published_ones():
    counts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(make(), stacked=True))) for name, make in MODELS.items()
    }
    assert counts["3b"] == 3_754_622_976
    assert counts["7b"] == 8_292_166_656
    assert counts["32b"] == 33_452_718_336
    assert counts["72b"] == 73_410_777_344
