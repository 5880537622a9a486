"""LoRA adapters in PEFT's format: merged while converting, written and read again; what is more than that is refused."""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from svlm_jax import cli
from svlm_jax.checkpoints.adapters import LowRank, read_adapter, save_adapter
from svlm_jax.checkpoints.convert import convert
from svlm_jax.checkpoints.hub_config import write_config
from svlm_jax.checkpoints.names import canonical, in_memory, name_table
from svlm_jax.configs.models import tiny
from svlm_jax.errors import UserError

CONFIG = tiny(96)
QUERY, DOWN, VISION = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight", "visual.blocks.2.attn.qkv.weight"
RANKS = {QUERY: 4, DOWN: 2, VISION: 4}


def shapes() -> dict[str, tuple[int, ...]]:
    return {piece.name: piece.source_shape for piece in name_table(CONFIG)}


def halves(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(name))
    (out, inner), rank = shapes()[name], RANKS[name]
    return rng.standard_normal((rank, inner), np.float32), rng.standard_normal((out, rank), np.float32)


def write_base(folder: Path, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    content = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes().items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(CONFIG)))
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return content


def write_adapter(folder: Path, *, prefix: str = "base_model.model.", config: dict | None = None, **more: np.ndarray) -> Path:
    """An adapter as PEFT writes it."""
    folder.mkdir()
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "rank_pattern": {"mlp.down_proj": 2}, "alpha_pattern": {"down_proj": 6}}
    (folder / "adapter_config.json").write_text(json.dumps(stated | (config or {})))
    content = dict(more)
    for name in RANKS:
        module = prefix + in_memory(name).removesuffix(".weight")
        content[f"{module}.lora_A.weight"], content[f"{module}.lora_B.weight"] = halves(name)
    save_file(content, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("config", "scales"), [({}, (4.0, 3.0)), ({"use_rslora": True}, (16 / 2, 6 / math.sqrt(2)))], ids=["plain", "rslora"])
@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_merged_is_the_sum(tmp_path, config, scales, form):
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", config=config)
    merged = convert(tmp_path / "base", tmp_path / "merged", form=form, adapter=adapter).path
    if form == "orbax":
        merged = convert(merged, tmp_path / "back").path
    found = load_file(merged / "model.safetensors")
    for name, tensor in base.items():
        if name not in RANKS:
            assert found[name].tobytes() == tensor.tobytes(), name
            continue
        a, b = halves(name)
        np.testing.assert_allclose(found[name], tensor + scales[name == DOWN] * (b @ a), rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_sum_is_rounded_once(tmp_path):
    base, adapter = write_base(tmp_path / "base", ml_dtypes.bfloat16), write_adapter(tmp_path / "adapter")
    assert cli.run(["convert", str(tmp_path / "base"), str(tmp_path / "merged"), "--to", "hf", "--adapter", str(adapter)]) == 0
    found = load_file(tmp_path / "merged" / "model.safetensors")[QUERY]
    a, b = halves(QUERY)
    assert found.dtype == ml_dtypes.bfloat16
    wide = base[QUERY].astype(np.float32) + 4 * (b @ a)
    assert (np.abs(found.astype(np.float32) - wide) <= np.abs(wide) * 2**-8).all()


def test_what_is_written_is_read_again(tmp_path):
    adapter = {name: LowRank(*halves(name), scale) for name, scale in zip(RANKS, (4.0, 3.0, 0.5), strict=True)}
    saved = save_adapter(adapter, tmp_path / "adapter", base="someone/model")
    again = read_adapter(saved, CONFIG)
    assert again.keys() == adapter.keys()
    for name, pair in adapter.items():
        assert again[name].scale == pair.scale
        np.testing.assert_array_equal(again[name].a, pair.a)
        np.testing.assert_array_equal(again[name].b, pair.b)
    assert all(canonical(name).startswith(("model.", "visual.")) for name in load_file(saved / "adapter_model.safetensors"))
    with pytest.raises(UserError, match="exists already"):
        save_adapter(adapter, saved)
    with pytest.raises(UserError, match="an adapter of nothing cannot be saved"):
        save_adapter({}, tmp_path / "none")
    mixed = adapter | {QUERY: dataclasses.replace(adapter[QUERY], a=adapter[QUERY].a.astype(np.float16))}
    with pytest.raises(UserError, match="an adapter of float16, float32 cannot be saved"):
        save_adapter(mixed, tmp_path / "mixed")


PREFIX = "base_model.model.model.language_model."
BAD = {
    "kind": ({"config": {"peft_type": "LOHA"}}, r"has peft_type 'LOHA'"),
    "dora": ({"config": {"use_dora": True}}, r"use_dora = True, which is not supported"),
    "bias": ({"config": {"bias": "all"}}, r"has bias 'all', which is not supported"),
    "whole modules": ({"config": {"modules_to_save": ["lm_head"]}}, r"modules_to_save = \['lm_head'\], which is not supported"),
    "alpha": ({"config": {"lora_alpha": None}}, r"lora_alpha None"),
    "embedding": ({PREFIX + "embed_tokens.lora_embedding_A": np.ones((4, 96), np.float32)}, r"which is no half of a low-rank product"),
    "half": ({PREFIX + "layers.0.self_attn.o_proj.lora_A.weight": np.ones((4, 64), np.float32)}, r"has one half only"),
    "unknown": ({PREFIX + "layers.9.mlp.up_proj.lora_A.weight": np.ones((4, 64), np.float32)}, r"adapts model\.layers\.9\.mlp\.up_proj\.weight, which"),
    "shape": (
        {
            PREFIX + "layers.0.mlp.up_proj.lora_A.weight": np.ones((4, 63), np.float32),
            PREFIX + "layers.0.mlp.up_proj.lora_B.weight": np.ones((128, 4), np.float32),
        },
        r"adds \[128, 4\] x \[4, 63\] to model\.layers\.0\.mlp\.up_proj\.weight, which is \[128, 64\]",
    ),
}


@pytest.mark.parametrize(("how", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_merged(tmp_path, how, message):
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", **how)
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "base", tmp_path / "merged", adapter=adapter)
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json in"):
        read_adapter(tmp_path, CONFIG)
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors: save the adapter as safetensors"):
        read_adapter(adapter, CONFIG)
