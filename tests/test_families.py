"""Checkpoints that transformers wrote, one a family, and the logits that it gave for them (tests/parity/write_fixtures.py)."""

import dataclasses
import inspect

import jax
import numpy as np
import oracle
import pytest
from prompts import prompts
from safetensors.numpy import load_file

from svlm_jax.checkpoints.hub_config import family_of, read_config
from svlm_jax.checkpoints.load import load_params
from svlm_jax.checkpoints.save import save_params
from svlm_jax.model.qwen_vl import forward

FOLDER = oracle.DATA / "checkpoints"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
TOLERANCE = 1e-3
run = jax.jit(inspect.unwrap(forward), static_argnums=1)  # unwrapped, because the checked signature gives all visuals one size


def test_every_family_has_one():
    assert FAMILIES == ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", ["text", "image", "clip"])  # the clip has several grids
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_theirs(family, name):
    expected = oracle.read_json(FOLDER / family / "expected.json.gz")
    config = dataclasses.replace(read_config(FOLDER / family), name="")
    assert family_of(config) == family
    p = prompts(family)[name]
    params = load_params(FOLDER / family, config, dtype=np.float32)
    visuals = [frames[None] for frames in p.visuals]
    found = run(params, config, p.tokens[None], p.positions[None], visuals=visuals, places=p.places[None] if visuals else None)
    wanted = np.array(expected["logits"][name])
    assert wanted.std() > 0.3
    np.testing.assert_allclose(np.asarray(found)[0][:, expected["ids"]], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_their_bytes(family, tmp_path):
    config = read_config(FOLDER / family)
    saved = save_params(load_params(FOLDER / family, config), config, tmp_path / "ours")
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER / family, saved))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].tobytes() == after[name].tobytes() for name in before)
    assert dataclasses.replace(read_config(saved), name="") == dataclasses.replace(config, name="")
