"""config.json as the Hub has it and as transformers 5 writes it; what is not supported is refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest

from svlm_jax.checkpoints.hub_config import read_config, write_config
from svlm_jax.configs.models import qwen2_5_vl_3b, qwen2_5_vl_7b, qwen3_vl_4b, qwen3_vl_8b, tiny
from svlm_jax.errors import UserError


def published(**changes) -> dict:
    """What the 7B model's config.json says on the Hub."""
    vision = {
        **{"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3},
        **{"out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112},
        **{"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
    }
    return {
        **{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_act": "silu", "hidden_size": 3584},
        **{"intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06},
        **{"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        **{"use_sliding_window": False, "vision_config": vision, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        **{"vocab_size": 152064},
        **changes,
    }


def nested(flat: dict) -> dict:
    """The same as transformers 5 saves it."""
    outer = ("architectures", "model_type", "vision_config", "tie_word_embeddings")
    text = {key: value for key, value in flat.items() if key not in (*outer, "rope_theta", "rope_scaling")}
    text |= {
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {**flat["rope_scaling"], "type": "default", "rope_type": "default", "rope_theta": flat["rope_theta"]},
    }
    vision = {key: value for key, value in flat["vision_config"].items() if key not in ("in_chans", "spatial_patch_size")}
    return {**{key: flat[key] for key in outer}, "vision_config": {**vision, "in_channels": 3}, "text_config": text}


def read(folder: Path, content: dict):
    (folder / "config.json").write_text(json.dumps(content))
    return dataclasses.replace(read_config(folder), name="")


def test_configs_flat_and_nested(tmp_path):
    wanted = dataclasses.replace(qwen2_5_vl_7b(), name="")
    assert read(tmp_path, published()) == read(tmp_path, nested(published())) == wanted
    assert read(tmp_path, write_config(wanted)) == wanted
    assert read_config(tmp_path).name == tmp_path.name and read_config(tmp_path, name="it").name == "it"


def test_ties_inside_and_outside(tmp_path):
    three = dataclasses.replace(qwen2_5_vl_3b(), name="")
    sizes = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2}
    flat = published(**sizes, vocab_size=151936, tie_word_embeddings=True)
    flat["vision_config"]["out_hidden_size"] = 2048
    inside = nested(flat)
    inside["text_config"]["tie_word_embeddings"] = inside.pop("tie_word_embeddings")
    assert read(tmp_path, flat) == read(tmp_path, nested(flat)) == read(tmp_path, inside) == three
    assert read(tmp_path, write_config(three)) == three


def published_qwen3(text: dict | None = None, vision: dict | None = None) -> dict:
    """What the 4B model's config.json says on the Hub."""
    return {
        **{"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": True},
        "text_config": {
            **{"attention_bias": False, "dtype": "bfloat16", "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560},
            **{"intermediate_size": 9728, "model_type": "qwen3_vl_text", "num_attention_heads": 32, "num_hidden_layers": 36},
            **{"num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 5000000, "tie_word_embeddings": True, "vocab_size": 151936},
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            **(text or {}),
        },
        "vision_config": {
            **{"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024},
            **{"in_channels": 3, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304},
            **{"out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
            **(vision or {}),
        },
    }


def test_the_configs_of_qwen3_vl(tmp_path):
    four, eight = (dataclasses.replace(sizes(), name="") for sizes in (qwen3_vl_4b, qwen3_vl_8b))
    assert read(tmp_path, published_qwen3()) == four
    assert read(tmp_path, write_config(four)) == four and read(tmp_path, write_config(eight)) == eight
    said = write_config(four)
    for part in ("text_config", "vision_config"):
        assert {key: said[part][key] for key in published_qwen3()[part]} == published_qwen3()[part]


BAD_CONFIGS = {
    "chunked rotations": (
        published_qwen3({"rope_scaling": {"mrope_interleaved": False, "mrope_section": [24, 20, 20]}}),
        r"text_config\.rope_scaling\.mrope_interleaved = False, which is not supported",
    ),
    "biases": (published_qwen3({"attention_bias": True}), r"text_config\.attention_bias = True, which is not supported"),
    "positions": (published_qwen3(vision={"num_position_embeddings": 2300}), r"num_position_embeddings = 2300, which is not the square"),
    "deepstack": (published_qwen3(vision={"deepstack_visual_indexes": [5, 24]}), r"deepstack_blocks \(5, 24\) must be numbers of the 24 blocks"),
    "interleaved": (
        published_qwen3({"rope_scaling": {"mrope_interleaved": True, "mrope_section": [16, 24, 24]}}),
        r"mrope_section \(16, 24, 24\) cannot be interleaved",
    ),
    "family": (
        published(model_type="llava"),
        r"config\.json has model_type 'llava', which is not supported: the families are qwen2_5_vl, qwen2_vl, qwen3_vl$",
    ),
    "no family": ({}, r"has model_type None"),
    "field": ({k: v for k, v in published().items() if k != "vocab_size"}, r"config\.json has no field vocab_size: take"),
    "vision": ({k: v for k, v in published().items() if k != "vision_config"}, r"has no field vision_config"),
    "vision field": (published(vision_config={**published()["vision_config"], "depth": None}), r"has no field vision_config\.depth"),
    "rope": (published(rope_scaling=None), r"has no field rope_scaling"),
    "sections": (published(rope_scaling={"type": "mrope"}), r"has no field rope_scaling\.mrope_section"),
    "short": (
        published(rope_scaling={"type": "mrope", "mrope_section": [16, 24]}),
        r"mrope_section = \[16, 24\], which is not",
    ),
    "yarn": (
        published(rope_scaling={"type": "yarn", "mrope_section": [16, 24, 24]}),
        r"rope_scaling\.type = 'yarn', which is not",
    ),
    "window": (published(use_sliding_window=True), r"use_sliding_window = True, which is not supported"),
    "activation": (published(hidden_act="gelu"), r"hidden_act = 'gelu', which is not supported"),
    "quantized": (published(quantization_config={"quant_method": "awq"}), r"describes quantized weights"),
    "text": (published(hidden_size="3584"), r"hidden_size = '3584', which is not a number that it can be"),
    "sum": (published(rope_scaling={"type": "mrope", "mrope_section": [1, 2, 3]}), r"must sum to half the head size"),
    "list": ([1], r"is not a JSON object"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_a_nested_field_is_named_in_full(tmp_path):
    content = nested(published())
    del content["text_config"]["hidden_size"]
    with pytest.raises(UserError, match=r"has no field text_config\.hidden_size"):
        read(tmp_path, content)


def test_no_config_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json in"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"head_dim": 32, "mrope_section": (4, 6, 6)}}, "head_dim 32 cannot be exported"),
        ({"vision": {"rms_norm_eps": 1e-5}}, "rms_norm_eps 1e-05 cannot be exported"),
        ({"vision": {"tokens_per_second": 2.5}}, "tokens_per_second 2.5 cannot be exported"),
    ],
)
def test_configs_that_no_file_can_describe(change, message):
    parts = {part: dataclasses.replace(getattr(tiny(), part), **fields) for part, fields in change.items()}
    with pytest.raises(UserError, match=message):
        write_config(dataclasses.replace(tiny(), **parts))
