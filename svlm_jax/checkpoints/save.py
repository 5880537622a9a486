"""Writes a Hugging Face checkpoint that transformers and vLLM load: the name table read backwards."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.checkpoints.hub_config import FAMILIES, TokenIds, family_of, write_config
from svlm_jax.checkpoints.names import Index, Piece, in_memory, name_table
from svlm_jax.checkpoints.plan import INDEX, SINGLE, Path_, leaves
from svlm_jax.checkpoints.safetensors_file import FLOATS, Outgoing, write_file
from svlm_jax.checkpoints.staging import Staging, refuse_existing, staged
from svlm_jax.checkpoints.stream_settings import FILE as STREAM_SETTINGS
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import is_quantized
from svlm_jax.model.qwen_vl import abstract_params, is_stacked
from svlm_jax.storage import Place, at
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Params

Progress = Callable[[int, int], None]  # bytes done, bytes in total
COMPANIONS = (  # beside the weights: tokenizer, prompt template, image processor, sampling defaults, terms
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("generation_config.json", STREAM_SETTINGS, "README.md", "LICENSE", "NOTICE"),
)


def save_params(
    params: Params,
    config: ModelConfig,
    path: str | Place,
    *,
    tokenizer_files_from: str | Place | None = None,
    shard_bytes: float = 5e9,
) -> Place:
    """Writes the parameters, stacked or not, as directory `path`: Hub names, safetensors, config.json, tokenizer files.

    All is written beside `path` and renamed at the end: `path` is whole or not there; it may be in a bucket. The host holds one tensor
    at a time.

    Args:
      tokenizer_files_from: a checkpoint's directory whose tokenizer, template, processor and generation files are copied, and
        whose token ids config.json states; without one, Qwen2.5-VL's ids are stated and no file is copied.
      shard_bytes: a file's size at most, unless one tensor alone is larger.

    Raises UserError where `path` exists, or cannot be written, or parameters and config do not match.
    """
    folder = at(path)
    refuse_existing(folder)
    if is_quantized(params):
        raise UserError("quantized weights are not saved, but made anew at every start: save the parameters as they were loaded, not quantized")
    dtype = _check(params, config)
    source = None if tokenizer_files_from is None else at(tokenizer_files_from)
    described = write_config(config, TokenIds.of(Tokenizer.load(source)) if source else None, dtype=dtype.name)
    with staged(folder) as staging:
        parameter = dict(leaves(params)).__getitem__
        write_weights(parameter, config, staging, dtype, shard_bytes=shard_bytes, stacked=is_stacked(params))
        if source is not None:
            copy_companions(source, staging.folder)
        write_json(staging.folder / "config.json", described)
    return folder


def copy_companions(source: Place, folder: Path) -> None:
    """Copies what lies beside the weights: tokenizer, template, processor, sampling defaults, terms."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def _check(params: Params, config: ModelConfig) -> np.dtype:
    """The dtype of all parameters. UserError where they are not those of `config`, or of more dtypes than one."""
    have, want = dict(leaves(params)), dict(leaves(abstract_params(config, stacked=is_stacked(params))))
    for place in want.keys() | have.keys():
        dotted = ".".join(map(str, place))
        if place not in have or place not in want:
            state = "not in the config" if place in have else "missing"
            raise UserError(f"parameter {dotted} is {state}: save with the model's own config")
        if have[place].shape != want[place].shape:
            raise UserError(f"parameter {dotted} has shape {have[place].shape}, the config wants {want[place].shape}")
    dtypes = {np.dtype(leaf.dtype) for leaf in have.values()}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS.values()):
        raise UserError(f"parameters of {', '.join(sorted(d.name for d in dtypes))} cannot be saved: make them one floating-point type")
    return dtypes.pop()


def write_weights(
    parameter: Callable[[Path_], Any],
    config: ModelConfig,
    staging: Staging,
    dtype: np.dtype,
    *,
    shard_bytes: float,
    stacked: bool = False,
    written: Callable[[int], None] | None = None,
) -> None:
    """Writes safetensors files, and their index where there are several.

    Args:
      parameter: gives each parameter. They are asked for in the order of the name table, those of a layer together.
      dtype: what they are.
      written: is told the bytes of each part.
    """
    word = next(word for word, floats in FLOATS.items() if floats == dtype)
    pieces = name_table(config, stacked=stacked)
    sizes = [math.prod(piece.source_shape) * dtype.itemsize for piece in pieces]
    shards: list[list[Piece]] = [[]]
    held = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += size
    spelt = in_memory if FAMILIES[family_of(config)].spelt_as_in_memory else str
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        file = staging.folder / name
        write_file(file, [Outgoing(spelt(p.name), word, p.source_shape) for p in shard], _values(shard, parameter), written=written)
        staging.settle(file)
    if len(shards) > 1:
        weight_map = {spelt(piece.name): name for name, shard in zip(names, shards, strict=True) for piece in shard}
        write_json(staging.folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))})


def _values(pieces: list[Piece], parameter: Callable[[Path_], Any]) -> Iterator[np.ndarray]:
    """The tensors, one after the other, as views of the parameters where possible."""
    for piece in pieces:
        yield piece.unordered(_block(parameter(piece.path), piece.index))


def _block(leaf: Any, index: Index) -> np.ndarray:
    """What a piece fills of a parameter, on the host."""
    if index and isinstance(index[0], int):  # one layer of a stacked parameter; on its own, it is compiled once for all layers
        leaf, index = leaf[index[0]], index[1:]
    if not index and isinstance(leaf, jax.Array):  # an array that is read keeps what was read on the host for as long as it lives
        leaf = jnp.array(leaf, copy=True)
    return np.asarray(leaf[index] if index else leaf)


def write_json(file: Path, content: dict) -> None:
    """Sorted and indented, as transformers writes it."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
