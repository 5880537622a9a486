"""Small engines with the bundled tokenizer, for tests that need no recorded answer."""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from contract import Contract

from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.configs.models import tiny, tiny_qwen2_vl, tiny_qwen3_vl
from svlm_jax.demo.make_tokenizer import TINY
from svlm_jax.model.qwen_vl import init_params
from svlm_jax.streaming.engine import Engine, make_spec
from svlm_jax.streaming.prompt import encode_stamp, stamp_times
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Params

FAMILIES = {"qwen2_5_vl": tiny, "qwen2_vl": tiny_qwen2_vl, "qwen3_vl": tiny_qwen3_vl}


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


@functools.cache
def model(layers: int = 1, depth: int = 0, family: str = "qwen2_5_vl") -> tuple[ModelConfig, Params]:
    """A model of `layers` decoder layers and `depth` vision blocks, with random weights that now and then close a turn."""
    config = FAMILIES[family](1024)
    deepstack = tuple(block for block in config.vision.deepstack_blocks if block < depth)[:layers]
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=depth, deepstack_blocks=deepstack),
        text=dataclasses.replace(config.text, num_hidden_layers=layers),
    )
    return config, init_params(config, jax.random.key(0))


def engine(
    config: StreamConfig,
    *,
    streams: int = 1,
    layers: int = 1,
    depth: int = 0,
    rows: int = 2,
    columns: int = 3,
    family: str = "qwen2_5_vl",
    **kwargs: Any,
) -> Engine:
    """An engine for frames of rows x columns tokens."""
    sizes, params = model(layers, depth, family)
    side = sizes.vision.merged_patch_size
    spec = make_spec(sizes, config, tokenizer(), height=rows * side, width=columns * side, **kwargs)
    return Engine(params, spec, tokenizer(), streams=streams)


def frames(engine: Engine, seed: int) -> np.ndarray:
    """Different noise for every seed, uint8 [streams, F, 3, height, width]."""
    spec = engine.spec
    shape = (engine.streams, spec.stream.frames_per_round, 3, spec.height, spec.width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def contract(engine: Engine) -> Contract:
    spec = engine.spec
    time = engine.tokenizer.encode("Time")[0]
    stamp = encode_stamp(engine.tokenizer, 0.0)[0] if spec.model.vision.stamped else None
    return Contract(spec.prompt, spec.stream, spec.visual_grid, Fraction(spec.temporal_step), time, stamp, len(spec.visuals))


def clip_ids(engine: Engine, start: float) -> list[int]:
    """The tokens of a round's clip."""
    spec, p = engine.spec, engine.spec.prompt
    stamps = [encode_stamp(engine.tokenizer, seconds) for seconds in stamp_times(start, spec.stream.frames_per_round, spec.stream.fps)]
    visual = [p.vision_start, *([p.video_pad] * math.prod(spec.visual_grid)), p.vision_end]
    return [id for stamp in stamps for id in (*stamp, *visual)] if spec.model.vision.stamped else visual
