"""Rebuilds the models of the recorded traces: configuration from Hugging Face names, weights from names and the recipe."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwen_vocabulary
import recipe

from svlm_jax.checkpoints.hub_config import read_config
from svlm_jax.checkpoints.names import name_table
from svlm_jax.config import ModelConfig
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Params

DATA = Path(__file__).parent / "data"


def read_json(path: str | Path) -> Any:
    """A trace, compressed or not."""
    path = Path(path)
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def write_json(path: str | Path, value: Any) -> None:
    """The same bytes for the same value, compressed if the name says so."""
    path, text = Path(path), json.dumps(value).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def tokenizer() -> Tokenizer:
    """The real Qwen vocabulary."""
    return Tokenizer.load(qwen_vocabulary.directory(Path.home() / ".cache" / "svlm-jax" / "qwen-vocabulary"))


def in_memory(name: str) -> str:
    """The spelling of transformers 4.52, which the recipe's seeds are made of."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def make_model(trace: dict[str, Any], *, stacked: bool = False) -> tuple[ModelConfig, Params]:
    """The traced model in float32, from its `config`, `family` and `candidate_token_ids`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": trace.get("family", "qwen2_5_vl"), **trace["config"]}))
        config = read_config(folder, name="traced")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(config, stacked=stacked))
    for piece in name_table(config, stacked=stacked):
        leaf: Any = params
        for key in piece.path:
            leaf = leaf[key]
        leaf[piece.index or ...] = piece.load(recipe.weight(in_memory(piece.name), piece.source_shape, trace["candidate_token_ids"]))
    return config, jax.tree.map(jnp.asarray, params)
