"""Small engines with the bundled tokenizer, for tests that need no recorded answer."""

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from contract import Contract

from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.configs.models import tiny, tiny_qwen2_vl
from svlm_jax.demo.make_tokenizer import TINY
from svlm_jax.model.qwen_vl import init_params
from svlm_jax.streaming.engine import Engine, make_spec
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Params

FAMILIES = {"qwen2_5_vl": tiny, "qwen2_vl": tiny_qwen2_vl}


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


@functools.cache
def model(layers: int = 1, depth: int = 0, family: str = "qwen2_5_vl") -> tuple[ModelConfig, Params]:
    """A model of `layers` decoder layers and `depth` vision blocks, with random weights that now and then close a turn."""
    config = FAMILIES[family](1024)
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=depth),
        text=dataclasses.replace(config.text, num_hidden_layers=layers),
    )
    return config, init_params(config, jax.random.key(0))


def engine(
    config: StreamConfig,
    *,
    streams: int = 1,
    layers: int = 1,
    depth: int = 0,
    height: int = 56,
    width: int = 84,
    family: str = "qwen2_5_vl",
    **kwargs: Any,
) -> Engine:
    sizes, params = model(layers, depth, family)
    spec = make_spec(sizes, config, tokenizer(), height=height, width=width, **kwargs)
    return Engine(params, spec, tokenizer(), streams=streams)


def frames(engine: Engine, seed: int) -> np.ndarray:
    """Different noise for every seed, uint8 [streams, F, 3, height, width]."""
    spec = engine.spec
    shape = (engine.streams, spec.stream.frames_per_round, 3, spec.height, spec.width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def contract(engine: Engine) -> Contract:
    spec = engine.spec
    time = engine.tokenizer.encode("Time")[0]
    return Contract(spec.prompt, spec.stream, spec.grid, Fraction(spec.temporal_step), time)
