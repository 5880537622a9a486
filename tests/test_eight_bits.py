"""Checkpoints in eight bits: what loading quantizes, on disk; loaded as it is, cut as the weights would be, and widened on request alone."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from devices import on_four_devices
from safetensors.numpy import load_file

import svlm_jax
from svlm_jax import cli
from svlm_jax.api import Checkpoint, Commentary
from svlm_jax.checkpoints.convert import convert
from svlm_jax.checkpoints.inspect import described, inspect
from svlm_jax.checkpoints.load import load_params
from svlm_jax.checkpoints.orbax_form import eight_bits, write_orbax
from svlm_jax.checkpoints.plan import leaves
from svlm_jax.checkpoints.save import save_params
from svlm_jax.configs.models import tiny_qwen3_vl
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import Quantization, is_quantized, quantize
from svlm_jax.model.qwen_vl import abstract_params

EVERY = Quantization("fp8", ("decoder", "head", "vision"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The tiny model in int8."""
    return convert(tiny_path(), tmp_path_factory.mktemp("small") / "int8", quantize="int8").path


def test_it_is_what_loading_quantizes(small):
    config = svlm_jax.load(tiny_path()).config
    jax.tree.map(np.testing.assert_array_equal, load_params(small, config), load_params(tiny_path(), config, quantize="int8"))
    assert is_quantized(load_params(small, config, quantize="int8"))


def test_every_part_of_a_model_with_a_tied_head(tmp_path):
    config = tiny_qwen3_vl(96)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32), jnp.bfloat16), abstract_params(config))
    hf = save_params(params, config, tmp_path / "hf")
    done = convert(hf, tmp_path / "fp8", quantize=EVERY)
    found = load_params(done.path, config)
    jax.tree.map(np.testing.assert_array_equal, found, quantize(params, EVERY))
    assert done.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(found)) < sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert inspect(done.path).quantization == EVERY


def test_eight_bit_floats_are_laid_out_for_rows_in_eight_bits(tmp_path):
    """What is on disk stays what it was; the vision tower's weights are made so while they are loaded."""
    with pytest.raises(UserError, match="fp8_products is how weights are used: convert them to fp8, and start with --quantize fp8_products"):
        convert(tiny_path(), tmp_path / "out", quantize="fp8_products")
    kept = convert(tiny_path(), tmp_path / "fp8", quantize="fp8").path
    opened = Checkpoint.open(kept, quantize="fp8_products")
    found, plain = opened.load().params, svlm_jax.load(tiny_path())
    assert jax.tree.map(lambda a: (a.shape, a.dtype), opened.shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), found)
    jax.tree.map(np.testing.assert_array_equal, found, quantize(plain.params, Quantization("fp8_products")))
    jax.tree.map(np.testing.assert_array_equal, found, svlm_jax.load(tiny_path(), quantize="fp8_products").params)
    with pytest.raises(UserError, match="holds decoder, head in fp8 already"):
        load_params(kept, plain.config, quantize=Quantization("fp8_products", ("vision",)))


def test_it_serves_as_it_is(small):
    opened = Checkpoint.open(small)
    assert opened.quantization == Quantization("int8") and opened.dtype == ml_dtypes.bfloat16
    params = opened.load().params
    assert jax.tree.map(lambda a: (a.shape, a.dtype), opened.shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert opened.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    said = list(Commentary(sample_path(), small, duration=1, temperature=0, max_new_tokens=3))
    assert len(said) == 1 and said[0].tokens


def test_widening_is_asked_for(small, tmp_path):
    wide = load_file(convert(small, tmp_path / "wide", dtype=ml_dtypes.bfloat16).path / "model.safetensors")
    before = load_file(tiny_path() / "model.safetensors")
    assert wide.keys() == before.keys()
    changed = {name for name, tensor in wide.items() if tensor.tobytes() != before[name].tobytes()}
    assert changed and all("_proj" in name or name == "lm_head.weight" for name in changed) and not any("bias" in name for name in changed)
    for name in changed:
        ours, theirs = wide[name].astype(np.float32), before[name].astype(np.float32)
        largest = np.abs(theirs).max(axis=1, keepdims=True)  # of what makes one output
        assert (np.abs(ours - theirs) <= (0.5 / 127 + 1 / 256) * largest).all(), name  # half a step of int8, and half one of bfloat16


def test_the_command_line(tmp_path, capsys):
    target = tmp_path / "int8"
    assert cli.run(["convert", str(tiny_path()), str(target), "--dtype", "int8"]) == 0
    assert "bytes of bfloat16 and int8 in Orbax's form" in capsys.readouterr().out
    assert cli.run(["inspect", str(target)]) == 0
    told = capsys.readouterr().out
    assert "decoder, head in int8, and a scale an output" in told and "sharding    saved whole, by no mesh" in told
    assert cli.run(["check", str(target)]) == 0
    assert cli.run(["convert", str(tiny_path()), str(tmp_path / "hf"), "--dtype", "fp8", "--to", "hf"]) == 1
    assert "weights in eight bits are written in Orbax's form alone" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_what_it_is_not_for(small, tmp_path):
    config = svlm_jax.load(tiny_path()).config
    with pytest.raises(UserError, match=r"holds decoder, head in int8 already: leave the quantization out"):
        load_params(small, config, quantize="fp8")
    with pytest.raises(UserError, match="in int8, which are not for training"):
        load_params(small, config, stacked=True)
    for form, eight in ((None, None), ("orbax", None), (None, "int8")):
        with pytest.raises(UserError, match="weights in int8 already, and what was lost on the way does not come back"):
            convert(small, tmp_path / "out", form=form, quantize=eight)
    assert not (tmp_path / "out").exists()


def test_a_scale_that_is_missing(tmp_path):
    model = svlm_jax.load(tiny_path())
    stored = eight_bits(dict(leaves(jax.tree.map(np.asarray, model.params))), Quantization("int8"), tied=False)
    del stored["text", "layers", 1, "down", "scale"]
    write_orbax(tmp_path, [stored])
    with pytest.raises(UserError, match=r"lacks parameter text\.layers\.1\.down\.scale, which"):
        load_params(tmp_path, model.config)


SHARDED = """
import sys, jax, numpy as np
from pathlib import Path
from svlm_jax.checkpoints.hub_config import read_config
from svlm_jax.checkpoints.load import load_params
from svlm_jax.checkpoints.orbax_form import library
from svlm_jax.model.quantized import Quantization, quantized_shardings
from svlm_jax.sharding import make_mesh, param_shardings
small, plain, out = map(Path, sys.argv[1:])
config = read_config(small)
shardings = param_shardings(config, make_mesh(fsdp=2, tensor=2))
params = load_params(small, config, shardings=shardings)
wanted = quantized_shardings(shardings, Quantization("int8"))
assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), params, wanted)))
jax.tree.map(np.testing.assert_array_equal, params, load_params(small, config))
words = lambda tree: {str(key): words(node) for key, node in tree.items()} if isinstance(tree, dict) else tree
library().save((out / "params").absolute(), words(load_params(plain, config, shardings=shardings)))
"""


def test_on_a_mesh(small, tmp_path):
    """Each device has its part of values and scale; and `inspect` tells how a checkpoint was cut that a mesh wrote."""
    shutil.copytree(tiny_path(), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    on_four_devices(SHARDED, small, tiny_path(), tmp_path / "out")
    told = dict(described(inspect(tmp_path / "out")))["sharding"]
    assert told.startswith("saved on a mesh of fsdp 2 x tensor 2: ") and " whole" in told and " cut (fsdp, tensor)" in told
