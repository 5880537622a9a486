"""Text-only Qwen2.5 weights become a Qwen-VL model's decoder where a checkpoint gives the vision tower, and are refused elsewhere."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from svlm_jax import cli
from svlm_jax.checkpoints.convert import convert
from svlm_jax.checkpoints.hub_config import read_config, write_config
from svlm_jax.checkpoints.load import load_params
from svlm_jax.checkpoints.names import name_table
from svlm_jax.configs.models import tiny
from svlm_jax.errors import UserError

CONFIG = tiny(96)


def tensors(seed: int, part: str | None = None, dtype=ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    pieces = [piece for piece in name_table(CONFIG) if part in (None, piece.path[0])]
    return {piece.name: rng.standard_normal(piece.source_shape, np.float32).astype(dtype) for piece in pieces}


def write(folder: Path, config: dict, content: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def text_only(folder: Path, content: dict[str, np.ndarray] | None = None, **changes) -> Path:
    """As Qwen2ForCausalLM is saved."""
    whole = write_config(CONFIG)
    apart = ("vision_config", "rope_scaling", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = {key: value for key, value in whole.items() if key not in apart} | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return write(folder, config | changes, tensors(1, "text") if content is None else content)


@pytest.fixture
def whole(tmp_path) -> Path:
    return write(tmp_path / "whole", write_config(CONFIG), tensors(0))


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_each_part_comes_from_its_own(tmp_path, whole, form):
    done = convert(text_only(tmp_path / "text"), tmp_path / "out", form=form, vision_from=whole)
    assert done.dtype == ml_dtypes.bfloat16 and read_config(done.path, name="it") == read_config(whole, name="it")
    back = done.path if form == "hf" else convert(done.path, tmp_path / "back").path
    found = load_file(back / "model.safetensors")
    wanted = tensors(0, None) | tensors(1, "text")
    assert found.keys() == wanted.keys() and all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_the_tower_takes_the_decoders_dtype(tmp_path):
    whole = write(tmp_path / "whole", write_config(CONFIG, dtype="float32"), tensors(0, dtype=np.float32))
    done = convert(text_only(tmp_path / "text"), tmp_path / "out", form="hf", vision_from=whole)
    name = "visual.blocks.0.attn.qkv.weight"
    assert load_file(done.path / "model.safetensors")[name].tobytes() == tensors(0, dtype=np.float32)[name].astype(ml_dtypes.bfloat16).tobytes()
    assert json.loads((done.path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_command_line_says_what_is_missing(tmp_path, whole, capsys):
    source, target = text_only(tmp_path / "text"), tmp_path / "out"
    assert cli.run(["convert", str(source), str(target)]) == 1
    assert "is of a text-only model" in capsys.readouterr().err and not target.exists()
    assert cli.run(["convert", str(source), str(target), "--vision-from", str(whole)]) == 0
    assert "in Orbax's form" in capsys.readouterr().out
    assert load_params(target, CONFIG)["text"]["norm"].shape == (64,)


def test_no_tower_is_made_up(tmp_path):
    with pytest.raises(UserError, match=r"text-only model, .* take one from a checkpoint .*--vision-from DIR"):
        read_config(text_only(tmp_path / "text"))


WRONG = {
    "heads": ({"num_attention_heads": 8}, None, r"describes heads of 8 numbers, and those of .* have 16"),
    "sizes": ({"num_key_value_heads": 4, "rope_theta": 1e4}, None, r"num_key_value_heads 4 where the other has 2, rope_theta 10000\.0 where"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, None, r"rope_scaling\.type = 'yarn', which is not supported"),
    "missing": ({}, lambda c: c.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
    "a tower": ({}, lambda c: c.update(tensors(0, "vision")), r"holds weights of Qwen2\.5-VL"),
}


@pytest.mark.parametrize(("changes", "damage", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(tmp_path, whole, changes, damage, message):
    content = tensors(1, "text")
    if damage:
        damage(content)
    with pytest.raises(UserError, match=message):
        convert(text_only(tmp_path / "text", content, **changes), tmp_path / "out", vision_from=whole)
    assert not (tmp_path / "out").exists()


def test_a_whole_model_keeps_its_tower(tmp_path, whole):
    with pytest.raises(UserError, match="is not text-only, so its vision tower is its own"):
        convert(whole, tmp_path / "out", vision_from=whole)
