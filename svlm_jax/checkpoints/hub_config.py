"""`config.json` of a Hugging Face checkpoint, read and written: flat as on the Hub, or nested as transformers 5 and Qwen3-VL have it."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from svlm_jax.checkpoints.run_form import described_in
from svlm_jax.config import ModelConfig, TextConfig, VisionConfig
from svlm_jax.errors import UserError
from svlm_jax.storage import Place, at
from svlm_jax.tokenizer import Tokenizer

VISION_NORM_EPSILON = 1e-6  # transformers fixes it in code (Qwen2_5_VLVisionBlock and its like), so no config.json states it


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The token ids that a config.json states. The defaults are Qwen2.5-VL's."""

    end_of_text: int = 151_643  # <|endoftext|>, which also pads
    turn_end: int = 151_645  # <|im_end|>
    vision_start: int = 151_652
    vision_end: int = 151_653
    image_pad: int = 151_655
    video_pad: int = 151_656

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenIds":
        names = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        return cls(*(tokenizer.special(name) for name in names))


class _Fields:
    """Fields of one config.json, looked up in the given parts of it in turn."""

    def __init__(self, file: Place, prefix: str, *parts: Mapping[str, Any]):
        self.file, self.prefix, self.parts = file, prefix, parts

    def get(self, name: str, default: Any = None) -> Any:
        return next((part[name] for part in self.parts if part.get(name) is not None), default)

    def need(self, name: str, kind: type, *, least: float = 1) -> Any:
        value = self.get(name)
        if value is None:
            raise UserError(f"{self.file} has no field {self.prefix}{name}: take the config.json that belongs to these weights")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value != kind(value) or value < least:
            raise UserError(f"{self.file} has {self.prefix}{name} = {value!r}, which is not a number that it can be")
        return kind(value)

    def integers(self, name: str, length: int | None = None) -> tuple[int, ...]:
        value = self.get(name)
        if value is None:
            raise UserError(f"{self.file} has no field {self.prefix}{name}: take the config.json that belongs to these weights")
        fits = isinstance(value, list) and all(isinstance(n, int) and n >= 0 for n in value) and length in (None, len(value))
        if not fits:
            count = f"{length} integers" if length else "integers"
            raise UserError(f"{self.file} has {self.prefix}{name} = {value!r}, which is not a list of {count}")
        return tuple(value)

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuses what our equations do not compute; an absent field is what it is by default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"{self.file} has {self.prefix}{name} = {value!r}, which is not supported: it must be {allowed[0]!r}")


def read_config(path: str | Place, *, name: str | None = None) -> ModelConfig:
    """The sizes of the model in directory `path`, from its config.json (of a training run's checkpoint, from the run's).

    Args:
      name: what the model is called; the directory's name by default.

    Raises UserError for a missing, unreadable or unsupported config.json; the message names the field and the file.
    """
    folder = at(path)
    file, raw = _read_json(folder)
    family = FAMILIES.get(raw.get("model_type"))  # type: ignore[arg-type]
    if raw.get("model_type") == TEXT_ONLY:
        raise UserError(
            f"{file} is of a text-only model, and what is wanted has a vision tower as well: take one from a checkpoint whose decoder "
            "has this size (svlm convert SRC DST --vision-from DIR)"
        )
    if family is None:
        raise UserError(
            f"{file} has model_type {raw.get('model_type')!r}, which is not supported: the families are {', '.join(sorted(FAMILIES))}"
        )
    nested = [part for part in (raw.get("text_config"),) if isinstance(part, dict)]
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        raise UserError(f"{file} has no field vision_config: take the config.json that belongs to these weights")
    text = _Fields(file, "text_config." if nested else "", *nested, raw)
    return ModelConfig(family.read_vision(_Fields(file, "vision_config.", vision)), _text(text, family), name or folder.resolve().name)


def is_text_only(folder: Place) -> bool:
    """Whether `folder` holds a model without a vision tower that a Qwen-VL model can have as its decoder."""
    return _read_json(folder)[1].get("model_type") == TEXT_ONLY


def read_decoder(path: str | Place, rotations: TextConfig) -> TextConfig:
    """The sizes of a text-only model. What it has no word for, how its rotations are shared out to three axes, is as in `rotations`."""
    file, raw = _read_json(at(path))
    fields = _Fields(file, "", raw)
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope = _Fields(file, "rope_scaling.", scaling)
    rope.must_be("rope_type", "default")
    rope.must_be("type", "default")
    size = fields.need("hidden_size", int) // fields.need("num_attention_heads", int)
    if size != rotations.head_dim:
        raise UserError(
            f"{file} describes heads of {size} numbers, and those of the checkpoint that is to give the vision tower have {rotations.head_dim}: "
            "take one of its own size"
        )
    return _decoder(fields, _Fields(file, "", scaling, raw), QWEN2_TEXT, rotations.mrope_section)


def _read_json(folder: Place) -> tuple[Place, dict[str, Any]]:
    """(file, content) of the config.json in `folder`. UserError where there is none, or it describes quantized weights."""
    file = described_in(folder) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no config.json in {file.parent}: pass the directory that a Hugging Face model was downloaded to") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a JSON object: download it again")
    if raw.get("quantization_config"):
        raise UserError(f"{file} describes quantized weights, which are not supported: take the bfloat16 checkpoint of the same model")
    return file, raw


def _shared(fields: _Fields) -> dict[str, Any]:
    """What every family calls by one name."""
    return {
        "depth": fields.need("depth", int),
        "num_heads": fields.need("num_heads", int),
        "patch_size": fields.need("patch_size", int),
        "spatial_merge_size": fields.need("spatial_merge_size", int),
        "temporal_patch_size": fields.need("temporal_patch_size", int),
        "in_channels": fields.get("in_channels", fields.get("in_chans", 3)),
        "rms_norm_eps": VISION_NORM_EPSILON,
    }


def _read_qwen2_5(fields: _Fields) -> VisionConfig:
    fields.must_be("hidden_act", "silu")
    return VisionConfig(
        **_shared(fields),
        hidden_size=fields.need("hidden_size", int),
        intermediate_size=fields.need("intermediate_size", int),
        out_hidden_size=fields.need("out_hidden_size", int),
        fullatt_block_indexes=fields.integers("fullatt_block_indexes"),
        window_size=fields.need("window_size", int),
        tokens_per_second=fields.need("tokens_per_second", float, least=0),
    )


def _write_qwen2_5(v: VisionConfig) -> dict[str, Any]:
    return {
        "fullatt_block_indexes": list(v.fullatt_block_indexes),
        "hidden_act": "silu",
        "hidden_size": v.hidden_size,
        "intermediate_size": v.intermediate_size,
        "out_hidden_size": v.out_hidden_size,
        "tokens_per_second": int(v.tokens_per_second),
        "window_size": v.window_size,
    }


def _read_qwen2(fields: _Fields) -> VisionConfig:
    """The tower's width is `embed_dim` here, and `hidden_size` the decoder's."""
    fields.must_be("hidden_act", "quick_gelu")
    width = fields.need("embed_dim", int)
    return VisionConfig(
        **_shared(fields),
        hidden_size=width,
        intermediate_size=int(width * fields.need("mlp_ratio", float)),
        out_hidden_size=fields.need("hidden_size", int),
        window_size=None,
        tokens_per_second=0,
        norm="layer",
        mlp="quick_gelu",
    )


def _write_qwen2(v: VisionConfig) -> dict[str, Any]:
    ratio = v.intermediate_size / v.hidden_size
    return {
        "embed_dim": v.hidden_size,
        "hidden_act": "quick_gelu",
        "hidden_size": v.out_hidden_size,
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
    }


QWEN3_VISION = {
    **{"norm": "layer", "mlp": "gelu_tanh", "window_size": None, "tokens_per_second": 0},
    **{"pixels": "symmetric", "patch_bias": True, "stamped": True},
}
QWEN3_TEXT = {"qkv_bias": False, "qk_norm": True, "mrope_interleaved": True}


def _read_qwen3(fields: _Fields) -> VisionConfig:
    fields.must_be("hidden_act", "gelu_pytorch_tanh")
    rows = fields.need("num_position_embeddings", int)
    side = math.isqrt(rows)
    if side**2 != rows:
        raise UserError(f"{fields.file} has {fields.prefix}num_position_embeddings = {rows}, which is not the square of a number")
    return VisionConfig(
        **_shared(fields),
        **QWEN3_VISION,  # type: ignore[arg-type]
        hidden_size=fields.need("hidden_size", int),
        intermediate_size=fields.need("intermediate_size", int),
        out_hidden_size=fields.need("out_hidden_size", int),
        position_grid=side,
        deepstack_blocks=fields.integers("deepstack_visual_indexes"),
    )


def _write_qwen3(v: VisionConfig) -> dict[str, Any]:
    return {
        "deepstack_visual_indexes": list(v.deepstack_blocks),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": v.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": v.intermediate_size,
        "model_type": "qwen3_vl",
        "num_position_embeddings": v.position_grid**2,
        "out_hidden_size": v.out_hidden_size,
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type."""

    title: str
    architecture: str  # transformers' class
    vision: Mapping[str, Any]  # fields of VisionConfig that every model of the family shares
    text: Mapping[str, Any]  # and of TextConfig
    read_vision: Callable[[_Fields], VisionConfig]
    write_vision: Callable[[VisionConfig], dict[str, Any]]
    nested: bool = False  # whether its config.json keeps the decoder's fields in text_config on the Hub as well
    spelt_as_in_memory: bool = False  # whether the Hub's files name tensors as transformers' modules do (`names.in_memory`)


TEXT_ONLY = "qwen2"  # model_type of Qwen2 and Qwen2.5 without a vision tower
QWEN2_TEXT = {"qkv_bias": True, "qk_norm": False, "mrope_interleaved": False}
PLAIN_TOWER = {"pixels": "clip", "patch_bias": False, "position_grid": 0, "deepstack_blocks": (), "stamped": False}
FAMILIES = {  # by model_type; Qwen2-VL first, as its features say more
    "qwen2_vl": Family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        {"norm": "layer", "mlp": "quick_gelu", "window_size": None, "tokens_per_second": 0, **PLAIN_TOWER},
        QWEN2_TEXT,
        _read_qwen2,
        _write_qwen2,
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        {"norm": "rms", "mlp": "swiglu", **PLAIN_TOWER},
        QWEN2_TEXT,
        _read_qwen2_5,
        _write_qwen2_5,
    ),
    "qwen3_vl": Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        QWEN3_VISION,
        QWEN3_TEXT,
        _read_qwen3,
        _write_qwen3,
        nested=True,
        spelt_as_in_memory=True,
    ),
}


def family_of(config: ModelConfig) -> str:
    """The model_type that has this vision tower and this decoder. UserError where none has."""
    parts = {"vision": config.vision, "text": config.text}
    odd: dict[str, list[str]] = {}
    for model_type, family in FAMILIES.items():
        shared = {"vision": family.vision, "text": family.text}
        odd[model_type] = [f"{part}.{name}" for part, fields in shared.items() for name, value in fields.items() if getattr(parts[part], name) != value]
        if not odd[model_type]:
            return model_type
    nearest = min(odd, key=lambda model_type: len(odd[model_type]))
    named = ", ".join(f"{name} = {getattr(parts[name.split('.')[0]], name.split('.')[1])!r}" for name in odd[nearest])
    raise UserError(f"no family has such a model: {FAMILIES[nearest].title} comes nearest and has no {named}; it cannot be exported")


def _text(fields: _Fields, family: Family) -> TextConfig:
    # rope_parameters in transformers 5, rope_scaling before; rope_theta has moved from beside it to within it
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling")
    if not isinstance(scaling, dict):
        raise UserError(f"{fields.file} has no field {fields.prefix}rope_scaling: take the config.json that belongs to these weights")
    rope = _Fields(fields.file, fields.prefix + "rope_scaling.", scaling)
    rope.must_be("rope_type", "default", "mrope")
    rope.must_be("type", "mrope", "default")
    rope.must_be("mrope_interleaved", family.text["mrope_interleaved"])
    theta = _Fields(fields.file, fields.prefix, scaling, *fields.parts)
    head_dim = fields.need("head_dim", int) if family.nested else None
    return _decoder(fields, theta, family.text, rope.integers("mrope_section", 3), head_dim)  # type: ignore[arg-type]


def _decoder(
    fields: _Fields, theta: _Fields, features: Mapping[str, Any], sections: tuple[int, int, int], head_dim: int | None = None
) -> TextConfig:
    fields.must_be("hidden_act", "silu")
    fields.must_be("use_sliding_window", False)
    fields.must_be("attention_bias", features["qkv_bias"])
    return TextConfig(
        **features,
        vocab_size=fields.need("vocab_size", int),
        hidden_size=fields.need("hidden_size", int),
        intermediate_size=fields.need("intermediate_size", int),
        num_hidden_layers=fields.need("num_hidden_layers", int),
        num_attention_heads=fields.need("num_attention_heads", int),
        num_key_value_heads=fields.need("num_key_value_heads", int),
        head_dim=head_dim,
        mrope_section=sections,
        rope_theta=theta.need("rope_theta", float),
        rms_norm_eps=fields.need("rms_norm_eps", float, least=0),
        # inside text_config before transformers 5, outside since; either one ties (as Qwen2_5_VLConfig reads it)
        tie_word_embeddings=any(bool(part.get("tie_word_embeddings")) for part in fields.parts),
    )


def write_config(config: ModelConfig, tokens: TokenIds | None = None, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of `config` as the Hub has it, which every version of transformers that knows the family reads, and vLLM.

    Args:
      tokens: the token ids that it states; Qwen2.5-VL's by default, which are Qwen3-VL's too.
      dtype: what the weights are stored as: "bfloat16", "float16" or "float32".

    Raises UserError for a config that no config.json can describe.
    """
    v, t, ids, model_type = config.vision, config.text, tokens or TokenIds(), family_of(config)
    family = FAMILIES[model_type]
    if not family.nested and t.head_dim * t.num_attention_heads != t.hidden_size:  # type: ignore[operator]
        raise UserError(f"head_dim {t.head_dim} cannot be exported: transformers wants hidden_size / num_attention_heads")
    if v.rms_norm_eps != VISION_NORM_EPSILON:
        raise UserError(f"vision rms_norm_eps {v.rms_norm_eps} cannot be exported: transformers has {VISION_NORM_EPSILON}")
    if v.tokens_per_second != int(v.tokens_per_second):
        raise UserError(f"vision tokens_per_second {v.tokens_per_second} cannot be exported: transformers wants an integer")
    vision = {
        "depth": v.depth,
        "in_channels": v.in_channels,
        "num_heads": v.num_heads,
        "patch_size": v.patch_size,
        "spatial_merge_size": v.spatial_merge_size,
        "temporal_patch_size": v.temporal_patch_size,
        **family.write_vision(v),
    }
    said = {
        "architectures": [family.architecture],
        "image_token_id": ids.image_pad,
        "model_type": model_type,
        "tie_word_embeddings": t.tie_word_embeddings,
        "video_token_id": ids.video_pad,
        "vision_end_token_id": ids.vision_end,
        "vision_start_token_id": ids.vision_start,
    }
    decoder = {
        "attention_dropout": 0.0,
        "bos_token_id": ids.end_of_text,
        "eos_token_id": ids.turn_end,
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": t.intermediate_size,
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_hidden_layers,
        "num_key_value_heads": t.num_key_value_heads,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_theta": t.rope_theta,
        "tie_word_embeddings": t.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": t.vocab_size,
    }
    if family.nested:
        rope = {"mrope_interleaved": t.mrope_interleaved, "mrope_section": list(t.mrope_section), "rope_type": "default"}
        decoder |= {"attention_bias": t.qkv_bias, "dtype": dtype, "head_dim": t.head_dim, "max_position_embeddings": 262_144}
        return {**said, "text_config": {**decoder, "model_type": f"{model_type}_text", "rope_scaling": rope}, "vision_config": vision}
    hub = {"in_chans": v.in_channels, "spatial_patch_size": v.patch_size}  # the Hub's words beside transformers'
    return {
        **said,
        **decoder,
        "max_position_embeddings": 128_000,
        "max_window_layers": t.num_hidden_layers,
        "rope_scaling": {"mrope_section": list(t.mrope_section), "type": "mrope"},
        "torch_dtype": dtype,
        "use_sliding_window": False,
        "vision_config": {**vision, **hub},
    }
