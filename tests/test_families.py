"""Checkpoints that transformers wrote, one a family, and the logits that it gave for them (tests/parity/write_fixtures.py)."""

import dataclasses
import inspect

import jax
import numpy as np
import oracle
import pytest
import small
from prompts import prompts
from safetensors.numpy import load_file

from svlm_jax.checkpoints.hub_config import family_of, read_config
from svlm_jax.checkpoints.load import load_params
from svlm_jax.checkpoints.save import save_params
from svlm_jax.data.chat import Clip, Image, lay_out
from svlm_jax.generate import answer
from svlm_jax.model.qwen_vl import forward
from svlm_jax.streaming.prompt import PromptLayout

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


def test_a_chat_of_qwen3_vl_sees_what_its_plain_forward_sees():
    """A picture and a stamped clip of two pairs of frames: DeepStack's features are at the pads of both."""
    config, params = small.model(layers=3, depth=3, family="qwen3_vl")
    layout, rng, watch = PromptLayout.from_tokenizer(small.tokenizer()), np.random.default_rng(0), tuple(range(0, 1024, 7))
    picture, frames = rng.integers(0, 256, (3, 64, 96), dtype=np.uint8), rng.integers(0, 256, (3, 3, 64, 32), dtype=np.uint8)
    prompt = lay_out(["A", Image(picture), "B", Clip(frames, fps=2.0), "C"], small.tokenizer(), layout, config.vision)
    assert small.tokenizer().decode(prompt.tokens.tolist()) == "AB<0.2 seconds><1.0 seconds>C"
    _, logits = answer(params, config, layout, prompt, max_new_tokens=1, watch=watch)
    visuals = [visual[None] for visual in prompt.visuals]
    wanted = run(params, config, prompt.tokens[None], prompt.positions[None], visuals=visuals, places=prompt.places[None])
    np.testing.assert_allclose(logits[0], np.asarray(wanted)[0, -1, list(watch)], atol=1e-4)
