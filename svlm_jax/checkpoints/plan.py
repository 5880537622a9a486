"""What of a checkpoint goes where, settled from the files' headers alone, before anything is allocated."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from svlm_jax.checkpoints.fetched import reader
from svlm_jax.checkpoints.names import Piece, canonical, name_table
from svlm_jax.checkpoints.safetensors_file import FLOATS, Stored, read_header
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.storage import Place
from svlm_jax.types import Params

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MARKS = {  # tensors by which a family is known
    "visual.blocks.0.mlp.gate_proj.weight": "Qwen2.5-VL",
    "visual.blocks.0.mlp.fc1.weight": "Qwen2-VL",
    "visual.blocks.0.mlp.linear_fc1.weight": "Qwen3-VL",
}
PICKLES = (".bin", ".pt", ".pth", ".pkl")
COMPARED_AT_ONCE = 16 << 20  # numbers
Path_ = tuple[str | int, ...]  # of a parameter, as keys of the nested dict


@dataclasses.dataclass(frozen=True)
class Block:
    """One tensor of the checkpoint, and the block of a parameter that it fills."""

    piece: Piece
    stored: Stored

    def box(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The block within a parameter of `shape`, as one slice an axis."""
        index = (*self.piece.index, *[slice(None)] * (len(shape) - len(self.piece.index)))
        return tuple(slice(i, i + 1) if isinstance(i, int) else slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class Target:
    """One parameter and all that fills it."""

    path: Path_
    shape: tuple[int, ...]
    dtype: np.dtype  # of the parameter; the tensors may be stored in another
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read from the files."""
        return sum(block.stored.nbytes for block in self.blocks)


def plan(folder: Place, config: ModelConfig, *, dtype: Any = None, stacked: bool = False, tower: bool = True) -> list[Target]:
    """Every parameter with its sources, each tensor used once and each block filled once.

    Args:
      dtype: of the parameters; None keeps what the files hold, which must then be one dtype throughout.
      tower: whether the files hold a vision tower; without one, the plan is the decoder's alone.

    Raises UserError naming the first tensor or file that is missing, unexpected, of the wrong shape, or no float.
    """
    tensors = tensors_of(folder)
    pieces = [piece for piece in name_table(config, stacked=stacked) if tower or piece.path[0] != "vision"]
    if config.text.tie_word_embeddings and HEAD in tensors:
        _check_tied(tensors.pop(HEAD), tensors.get(EMBEDDING))
    _check_names({piece.name for piece in pieces}, tensors, folder)
    for piece in pieces:
        stored = tensors[piece.name]
        if stored.shape != piece.source_shape:
            raise UserError(
                f"{stored.name} in {stored.file} has shape {list(stored.shape)}, but config.json describes {list(piece.source_shape)}: "
                "take the config.json that belongs to these weights"
            )
        if stored.dtype not in FLOATS:
            raise UserError(f"{stored.name} in {stored.file} is stored as {stored.dtype}: what can be loaded is {', '.join(FLOATS)}")
    wanted = np.dtype(dtype) if dtype is not None else _one_dtype([tensors[piece.name] for piece in pieces])
    wanted = np.dtype(jax.dtypes.canonicalize_dtype(wanted))  # float64 only where JAX has been told to keep it
    sources: dict[Path_, list[Block]] = {}
    for piece in pieces:
        sources.setdefault(piece.path, []).append(Block(piece, tensors[piece.name]))
    shapes = {path: leaf for path, leaf in leaves(abstract_params(config, stacked=stacked)) if tower or path[0] != "vision"}
    assert sources.keys() == shapes.keys(), sources.keys() ^ shapes.keys()
    targets = [Target(path, shapes[path].shape, wanted, tuple(blocks)) for path, blocks in sources.items()]
    for target in targets:  # with no two pieces alike (a test of the table), equal sizes mean each block once
        assert sum(math.prod(block.piece.source_shape) for block in target.blocks) == math.prod(target.shape), target.path
    return targets


def leaves(tree: Params) -> Iterator[tuple[Path_, Any]]:
    """(path, leaf) of every leaf of nested dicts."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(key.key for key in path), leaf


def weight_files(folder: Place) -> list[Place]:
    """The safetensors files of the checkpoint. UserError where there are none, or a shard that the index names is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing, which {INDEX} names: download it again")
        return files
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory: pass the one that a Hugging Face model was downloaded to")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, not a model: merge it into its base model first (svlm convert BASE DST --adapter DIR)")
    if any(file.suffix == ".safetensors" for file in folder.iterdir()):
        raise UserError(f"{folder} has safetensors files but neither {SINGLE} nor {INDEX}: download the index as well")
    if any(file.suffix in PICKLES for file in folder.iterdir()):
        raise UserError(f"{folder} holds pickled PyTorch weights only, which are not read: save them as safetensors (save_pretrained does)")
    raise UserError(f"no weights in {folder}: it needs {SINGLE}, or {INDEX} and the files it names")


def _weight_map(index: Place) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
            raise ValueError("its weight_map must name files beside it")
        return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({type(error).__name__}: {error}): download it again") from error


def tensors_of(folder: Place) -> dict[str, Stored]:
    """Every tensor of the checkpoint by its canonical name."""
    files = weight_files(folder)
    headers = {file.name: read_header(file) for file in files}
    if files[0].name != SINGLE:
        for name, file in _weight_map(folder / INDEX).items():
            if name not in headers[file]:
                raise UserError(f"{folder / file} lacks {name}, which {INDEX} says it holds: download both again")
    tensors: dict[str, Stored] = {}
    for header in headers.values():
        for stored in header.values():
            other = tensors.setdefault(canonical(stored.name), stored)
            if other is not stored:
                raise UserError(f"{stored.name} in {stored.file} is {other.name} in {other.file} again: remove one")
    return tensors


def _check_names(wanted: set[str], tensors: dict[str, Stored], folder: Place) -> None:
    for mark, family in MARKS.items():
        if mark in tensors and mark not in wanted:
            raise UserError(
                f"{folder} holds weights of {family} (there is {tensors[mark].name}), which its config.json does not describe: "
                "use the config.json that belongs to these weights"
            )
    missing = wanted - tensors.keys()
    if missing:
        raise UserError(f"{folder} lacks {some(missing)}, which config.json calls for: download it again, or use its own config.json")
    extra = tensors.keys() - wanted
    if extra:
        file = tensors[min(extra)].file
        raise UserError(
            f"{folder} holds {some(tensors[name].name for name in extra)} (in {file.name}), which no model of this config.json has: "
            "use the config.json that belongs to these weights"
        )


def some(names: Iterable[str]) -> str:
    """One name, and how many more there are."""
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def _check_tied(head: Stored, embedding: Stored | None) -> None:
    """A head in a checkpoint whose config ties it is harmless only where it repeats the embedding."""
    if embedding is None or head.dtype not in FLOATS:
        return  # what is wrong is found when the embedding is looked at
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if same:
        files = reader(head.file)
        one, two = files.tensor(head).reshape(-1), files.tensor(embedding).reshape(-1)
        for start in range(0, one.size, COMPARED_AT_ONCE):
            part = slice(start, start + COMPARED_AT_ONCE)
            same = same and np.array_equal(one[part], two[part])
            files.release(head)
            files.release(embedding)
    if not same:
        raise UserError(
            f"{head.name} in {head.file} differs from the embedding, but config.json ties the two (tie_word_embeddings): "
            "set it to false if the head was trained on its own"
        )


def _one_dtype(tensors: list[Stored]) -> np.dtype:
    """The dtype of all tensors."""
    odd = next((stored for stored in tensors if stored.dtype != tensors[0].dtype), None)
    if odd is not None:
        raise UserError(
            f"{odd.name} in {odd.file} is stored as {odd.dtype}, but {tensors[0].name} as {tensors[0].dtype}: say which dtype to load"
        )
    return FLOATS[tensors[0].dtype]
