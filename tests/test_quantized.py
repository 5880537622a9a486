"""Weights in eight bits: products near those of the weights they were made of, at the sizes of the 7B model, and nothing wider in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quantized_traces import agreement

import svlm_jax
from svlm_jax.api import Commentary
from svlm_jax.checkpoints.save import save_params
from svlm_jax.configs.models import qwen2_5_vl_7b, tiny
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import Quantization, Quantized, product, quantize, quantize_weight, quantized_shapes, quantized_shardings
from svlm_jax.model.qwen_vl import abstract_params, forward, init_params, vision_features
from svlm_jax.programs import tree_bytes
from svlm_jax.sharding import make_mesh, param_shardings

# Relative RMS error of a product. A number of 3 bits of fraction is off by 2.65% where it is drawn from a normal distribution, whatever its
# scale: two such factors by 3.75%
BARS = {"int8": 0.015, "fp8": 0.035, "fp8_products": 0.04}
# Of Qwen2.5-VL-7B: einsum, weight, axes that are summed over, how the weight is used
PRODUCTS = {
    "qkv": ("btd,dkch->btkch", (3584, 4, 9, 128), (0,), None),
    "out": ("btn,nd->btd", (4, 7, 128, 3584), (0, 1, 2), (3584, 3584)),
    "gate_up": ("btd,dcf->btcf", (3584, 2, 18944), (0,), None),
    "down": ("btf,fd->btd", (18944, 3584), (0,), None),
    "vision gate_up": ("btd,dcf->btcf", (1280, 2, 3420), (0,), None),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in PRODUCTS for kind in BARS if kind != "fp8_products" or name in ("qkv", "out", "vision gate_up")]
)
def test_products_at_7b_sizes_with_outlier_channels(name, kind):
    spec, shape, axes, used = PRODUCTS[name]
    r = np.random.default_rng(0)
    weight = r.standard_normal(shape, np.float32) * 0.02
    inputs = int(np.prod([shape[axis] for axis in axes]))
    flat = weight.reshape(inputs, -1)
    flat[:, r.choice(flat.shape[1], 16, replace=False)] *= 50  # outputs much larger than the others
    flat[:, 3] = 0  # and one that is always zero
    x = r.standard_normal((1, 40 if kind == "fp8_products" else 2, inputs), np.float32)
    x[..., r.choice(inputs, 8, replace=False)] *= 50  # massive activations
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    narrow = kind == "fp8_products"
    found = quantize_weight(jnp.asarray(weight), Quantization(kind).stored, axes, narrow=narrow)
    assert found.values.dtype.itemsize == 1 and found.scale.shape == tuple(n for axis, n in enumerate(shape) if axis not in axes)
    assert found.shape == shape and found.values.shape == ((*found.scale.shape, *(shape[axis] for axis in axes)) if narrow else shape)
    ours = product(spec, jnp.asarray(x, jnp.bfloat16), found if used is None else found.reshape(*used), jnp.float32)
    truth = np.asarray(x @ flat).reshape(ours.shape)
    channels = np.linalg.norm(np.asarray(ours) - truth, axis=1).reshape(-1) / np.maximum(np.linalg.norm(truth, axis=1).reshape(-1), 1e-9)
    assert np.linalg.norm(np.asarray(ours) - truth) / np.linalg.norm(truth) <= BARS[kind]
    assert np.median(channels) <= BARS[kind]  # small channels are not drowned by the outliers


@pytest.mark.parametrize(("kind", "stacked"), [("int8", False), ("fp8", True), ("fp8_products", False), ("fp8_products", True)])
def test_a_whole_model_of_every_part(kind, stacked):
    config = tiny()
    params = init_params(config, jax.random.key(0), stacked=stacked)
    every = Quantization(kind, ("decoder", "head", "vision"))
    small = quantize(params, every)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), small) == jax.tree.map(
        lambda a: (a.shape, a.dtype), quantized_shapes(abstract_params(config, stacked=stacked), every)
    )
    tokens = jax.random.randint(jax.random.key(1), (1, 40), 0, 1000)
    positions = jnp.broadcast_to(jnp.arange(40)[None, :, None], (1, 40, 3))
    plain, ours = (np.asarray(forward(p, config, tokens, positions)) for p in (params, small))
    assert 0 < np.linalg.norm(ours - plain) / np.linalg.norm(plain) < (0.05 if kind == "int8" else 0.15)
    frames = jax.random.randint(jax.random.key(2), (1, 2, 3, 56, 84), 0, 255).astype(jnp.uint8)
    plain, ours = (np.asarray(vision_features(p, config, frames).embedded) for p in (params, small))
    assert 0 < np.linalg.norm(ours - plain) / np.linalg.norm(plain) < (0.05 if kind == "int8" else 0.15)


def test_only_what_is_chosen():
    shapes = abstract_params(qwen2_5_vl_7b(), dtype=jnp.bfloat16)
    small = quantized_shapes(shapes, Quantization("int8"))
    assert isinstance(small["text"]["layers"][0]["down"], Quantized) and isinstance(small["text"]["head"], Quantized)
    assert small["text"]["embedding"] == shapes["text"]["embedding"] and small["vision"] == shapes["vision"]
    every = quantized_shapes(shapes, Quantization("fp8", ("decoder", "head", "vision")))
    assert tree_bytes(every) < tree_bytes(small) < 0.62 * tree_bytes(shapes)  # the embedding stays as it was
    config = dataclasses.replace(tiny(), text=dataclasses.replace(tiny().text, tie_word_embeddings=True))
    tied = quantized_shapes(abstract_params(config), Quantization("int8"))
    assert tied["text"]["embedding"].scale.shape == (config.text.vocab_size,)
    assert Quantization("fp8_products").parts == ("decoder", "head", "vision") and Quantization("fp8").parts == ("decoder", "head")
    narrow = quantized_shapes(shapes, Quantization("fp8_products"))
    layer, head, block = narrow["text"]["layers"][0], narrow["text"]["head"], narrow["vision"]["blocks"][0]
    assert layer["out"].narrow and layer["out"].values.shape == (3584, 4, 7, 128) and layer["out"].shape == (4, 7, 128, 3584)
    assert block["gate_up"].narrow and block["gate_up"].values.shape == (2, 3420, 1280) and narrow["vision"]["merger_in"].narrow
    assert not head.narrow and head.values.shape == (3584, 152_064)  # whose rows are few
    assert tree_bytes(narrow) == tree_bytes(every)
    for wrong in ({"kind": "int4"}, {"kind": "int8", "parts": ("hat",)}, {"kind": "int8", "parts": ()}):
        with pytest.raises(UserError, match="cannot be quantized"):
            Quantization(**wrong)


def test_a_tied_embedding_is_head_and_rows():
    config = dataclasses.replace(tiny(), text=dataclasses.replace(tiny().text, tie_word_embeddings=True))
    params = init_params(config, jax.random.key(0))
    tokens, positions = jnp.arange(8)[None], jnp.broadcast_to(jnp.arange(8)[None, :, None], (1, 8, 3))
    plain, ours = (np.asarray(forward(p, config, tokens, positions)) for p in (params, quantize(params, Quantization("int8"))))
    assert 0 < np.linalg.norm(ours - plain) / np.linalg.norm(plain) < 0.05


def test_shardings_follow_the_weights():
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 4), ("data", "fsdp", "sequence", "tensor"))
    layer = quantized_shardings(param_shardings(qwen2_5_vl_7b(), mesh), Quantization("int8"))["text"]["layers"][0]
    assert layer["qkv"].values.spec == PartitionSpec("fsdp", "tensor", None, None) and layer["qkv"].scale.spec == PartitionSpec("tensor", None, None)
    assert layer["down"].values.spec == PartitionSpec("tensor", "fsdp") and layer["down"].scale.spec == PartitionSpec("fsdp")
    narrow = quantized_shardings(param_shardings(qwen2_5_vl_7b(), mesh), Quantization("fp8_products"))["text"]["layers"][0]
    assert narrow["qkv"].values.spec == PartitionSpec("tensor", None, None, "fsdp") and narrow["qkv"].scale == layer["qkv"].scale
    assert narrow["out"].values.spec == PartitionSpec("fsdp", "tensor", None, None) and narrow["out"].scale.spec == PartitionSpec("fsdp")
    weight = jax.device_put(jnp.ones((8, 4)), NamedSharding(make_mesh(), PartitionSpec("fsdp", "tensor")))
    found = quantize_weight(weight, "int8", (0,))
    assert found.values.sharding.spec == PartitionSpec("fsdp", "tensor") and found.scale.sharding.spec == PartitionSpec("tensor")
    found = quantize_weight(weight, "fp8", (0,), narrow=True)
    assert found.values.sharding.spec == PartitionSpec("tensor", "fsdp") and found.scale.sharding.spec == PartitionSpec("tensor")


def test_loading(tmp_path):
    """From a checkpoint's files, as the whole tree is quantized; and not back into files."""
    plain, small = svlm_jax.load(tiny_path()), svlm_jax.load(tiny_path(), quantize="int8")
    wanted = quantize(plain.params, Quantization("int8"))
    jax.tree.map(np.testing.assert_array_equal, small.params, wanted)
    with pytest.raises(UserError, match="quantized weights are not saved"):
        save_params(small.params, small.config, tmp_path / "out", tokenizer_files_from=tiny_path())


def test_captions_with_weights_in_eight_bits():
    said = list(Commentary(sample_path(), tiny_path(), quantize="int8", duration=2, temperature=0, max_new_tokens=3))
    assert len(said) == 2 and all(one.tokens for one in said)


def test_words_of_a_recorded_run():
    """Every word before it being the recorded one; of a model with random weights, whose likeliest words lie close together."""
    trace = oracle.read_json(oracle.DATA / "streaming" / "equal_windows.json.gz")
    agree, count = agreement(trace, Quantization("int8"), rounds=6)
    assert count > 30 and agree >= 0.9 * count
