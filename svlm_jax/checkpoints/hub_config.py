"""`config.json` of a Hugging Face checkpoint, read and written: flat as on the Hub, or nested as transformers 5 saves it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svlm_jax.config import ModelConfig, TextConfig, VisionConfig
from svlm_jax.errors import UserError
from svlm_jax.tokenizer import Tokenizer

FAMILIES = ("qwen2_5_vl",)  # values of model_type that can be loaded
VISION_NORM_EPSILON = 1e-6  # transformers fixes it in code (Qwen2_5_VLVisionBlock), so no config.json states it


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

    def __init__(self, file: Path, prefix: str, *parts: Mapping[str, Any]):
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


def read_config(path: str | Path, *, name: str | None = None) -> ModelConfig:
    """The sizes of the model in directory `path`, from its config.json.

    Args:
      name: what the model is called; the directory's name by default.

    Raises UserError for a missing, unreadable or unsupported config.json; the message names the field and the file.
    """
    folder = Path(path)
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no config.json in {folder}: pass the directory that a Hugging Face model was downloaded to") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a JSON object: download it again")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{file} has model_type {family!r}, which is not supported: the families are {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise UserError(f"{file} describes quantized weights, which are not supported: take the bfloat16 checkpoint of the same model")
    nested = [part for part in (raw.get("text_config"),) if isinstance(part, dict)]
    vision = raw.get("vision_config")
    if not isinstance(vision, dict):
        raise UserError(f"{file} has no field vision_config: take the config.json that belongs to these weights")
    text = _Fields(file, "text_config." if nested else "", *nested, raw)
    return ModelConfig(_vision(_Fields(file, "vision_config.", vision)), _text(text), name or folder.resolve().name)


def _vision(fields: _Fields) -> VisionConfig:
    fields.must_be("hidden_act", "silu")
    return VisionConfig(
        depth=fields.need("depth", int),
        hidden_size=fields.need("hidden_size", int),
        intermediate_size=fields.need("intermediate_size", int),
        num_heads=fields.need("num_heads", int),
        out_hidden_size=fields.need("out_hidden_size", int),
        fullatt_block_indexes=fields.integers("fullatt_block_indexes"),
        patch_size=fields.need("patch_size", int),
        spatial_merge_size=fields.need("spatial_merge_size", int),
        temporal_patch_size=fields.need("temporal_patch_size", int),
        window_size=fields.need("window_size", int),
        tokens_per_second=fields.need("tokens_per_second", float, least=0),
        in_channels=fields.get("in_channels", fields.get("in_chans", 3)),
        rms_norm_eps=VISION_NORM_EPSILON,
    )


def _text(fields: _Fields) -> TextConfig:
    fields.must_be("hidden_act", "silu")
    fields.must_be("use_sliding_window", False)
    # rope_parameters in transformers 5, rope_scaling before; rope_theta has moved from beside it to within it
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling")
    if not isinstance(scaling, dict):
        raise UserError(f"{fields.file} has no field {fields.prefix}rope_scaling: take the config.json that belongs to these weights")
    rope = _Fields(fields.file, fields.prefix + "rope_scaling.", scaling)
    rope.must_be("rope_type", "default", "mrope")
    rope.must_be("type", "mrope", "default")
    rope.must_be("mrope_interleaved", False)
    theta = _Fields(fields.file, fields.prefix, scaling, *fields.parts)
    return TextConfig(
        vocab_size=fields.need("vocab_size", int),
        hidden_size=fields.need("hidden_size", int),
        intermediate_size=fields.need("intermediate_size", int),
        num_hidden_layers=fields.need("num_hidden_layers", int),
        num_attention_heads=fields.need("num_attention_heads", int),
        num_key_value_heads=fields.need("num_key_value_heads", int),
        mrope_section=rope.integers("mrope_section", 3),  # type: ignore[arg-type]
        rope_theta=theta.need("rope_theta", float),
        rms_norm_eps=fields.need("rms_norm_eps", float, least=0),
        # inside text_config before transformers 5, outside since; either one ties (as Qwen2_5_VLConfig reads it)
        tie_word_embeddings=any(bool(part.get("tie_word_embeddings")) for part in fields.parts),
    )


def write_config(config: ModelConfig, tokens: TokenIds | None = None, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of `config`, in the Hub's flat form, which every version of transformers and vLLM reads.

    Args:
      tokens: the token ids that it states; Qwen2.5-VL's by default.
      dtype: what the weights are stored as: "bfloat16", "float16" or "float32".

    Raises UserError for a config that no config.json can describe.
    """
    v, t, ids = config.vision, config.text, tokens or TokenIds()
    if t.head_dim * t.num_attention_heads != t.hidden_size:  # type: ignore[operator]
        raise UserError(f"head_dim {t.head_dim} cannot be exported: transformers wants hidden_size / num_attention_heads")
    if v.rms_norm_eps != VISION_NORM_EPSILON:
        raise UserError(f"vision rms_norm_eps {v.rms_norm_eps} cannot be exported: transformers has {VISION_NORM_EPSILON}")
    if v.tokens_per_second != int(v.tokens_per_second):
        raise UserError(f"vision tokens_per_second {v.tokens_per_second} cannot be exported: transformers wants an integer")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids.end_of_text,
        "eos_token_id": ids.turn_end,
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "image_token_id": ids.image_pad,
        "initializer_range": 0.02,
        "intermediate_size": t.intermediate_size,
        "max_position_embeddings": 128_000,
        "max_window_layers": t.num_hidden_layers,
        "model_type": FAMILIES[0],
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_hidden_layers,
        "num_key_value_heads": t.num_key_value_heads,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_scaling": {"mrope_section": list(t.mrope_section), "type": "mrope"},
        "rope_theta": t.rope_theta,
        "tie_word_embeddings": t.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids.video_pad,
        "vision_config": {
            "depth": v.depth,
            "fullatt_block_indexes": list(v.fullatt_block_indexes),
            "hidden_act": "silu",
            "hidden_size": v.hidden_size,
            "in_channels": v.in_channels,
            "in_chans": v.in_channels,  # the Hub's word for it
            "intermediate_size": v.intermediate_size,
            "num_heads": v.num_heads,
            "out_hidden_size": v.out_hidden_size,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.spatial_merge_size,
            "spatial_patch_size": v.patch_size,
            "temporal_patch_size": v.temporal_patch_size,
            "tokens_per_second": int(v.tokens_per_second),
            "window_size": v.window_size,
        },
        "vision_end_token_id": ids.vision_end,
        "vision_start_token_id": ids.vision_start,
        "vocab_size": t.vocab_size,
    }
