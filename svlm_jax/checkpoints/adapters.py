"""LoRA adapters in PEFT's format: read, merged into a base model while it is converted, and written.

A weight W [out, in] becomes W + scale * B A with A [r, in] and B [out, r] (arXiv 2106.09685); scale is alpha / r, or
alpha / sqrt(r) where `use_rslora` is set (arXiv 2312.03732).
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from svlm_jax.checkpoints.fetched import reader
from svlm_jax.checkpoints.names import Piece, canonical, in_memory, name_table
from svlm_jax.checkpoints.plan import PICKLES, Path_, some
from svlm_jax.checkpoints.safetensors_file import FLOATS, Outgoing, Stored, read_header, write_file
from svlm_jax.checkpoints.staging import staged
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.storage import Place, at
from svlm_jax.types import Float

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUFFIX = re.compile(r"^(?P<module>.*)\.lora_(?P<half>[AB])\.(default\.)?weight$")
UNSUPPORTED = ("use_dora", "modules_to_save", "layer_replication", "fan_in_fan_out", "trainable_token_indices", "target_parameters", "lora_bias")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is added to one weight."""

    a: Float[np.ndarray, "r inputs"]
    b: Float[np.ndarray, "outputs r"]
    scale: float

    def delta(self) -> np.ndarray:
        """scale * B A, float32 [outputs, inputs]."""
        return (self.b.astype(np.float32) @ self.a.astype(np.float32)) * np.float32(self.scale)


Adapter = Mapping[str, LowRank]  # by the canonical name of the weight


def read_adapter(folder: str | Place, config: ModelConfig) -> dict[str, LowRank]:
    """The adapter in `folder`, each half checked against the model that it is for.

    Raises UserError for what is missing, does not fit the model, or is more than a sum of low-rank products.
    """
    folder = at(folder).expanduser()
    stated = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = any(file.suffix in PICKLES for file in folder.iterdir())
        raise UserError(f"{folder} has no {WEIGHTS}" + (": save the adapter as safetensors, as pickles are not read" if pickled else ": copy it there"))
    halves: dict[str, dict[str, Stored]] = {}
    for name, stored in read_header(folder / WEIGHTS).items():
        match = SUFFIX.match(name)
        if match is None:
            raise UserError(f"{folder / WEIGHTS} holds {name}, which is no half of a low-rank product: only LoRA of linear layers is read")
        halves.setdefault(canonical(match["module"] + ".weight"), {})[match["half"]] = stored
    shapes = {piece.name: piece.source_shape for piece in name_table(config)}
    unknown = {name for name in halves if len(shapes.get(name, ())) != 2}
    if unknown:
        raise UserError(f"{folder} adapts {some(unknown)}, which is no linear layer of this model: use the base model that it was trained on")
    files, found = reader(folder), {}
    for name, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{folder / WEIGHTS} has one half only of what is added to {name}: save the adapter again")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or b.shape != (shapes[name][0], a.shape[0]) or a.shape[1] != shapes[name][1]:
            raise UserError(
                f"{folder / WEIGHTS} adds {list(b.shape)} x {list(a.shape)} to {name}, which is {list(shapes[name])}: "
                "use the base model that it was trained on"
            )
        for stored in (a, b):
            if stored.dtype not in FLOATS:
                raise UserError(f"{stored.name} in {stored.file} is stored as {stored.dtype}: what can be read is {', '.join(FLOATS)}")
        module, rank = a.name.split(".lora_")[0], a.shape[0]
        alpha = float(_patterned(stated.get("alpha_pattern"), module, stated["lora_alpha"]))
        scale = alpha / math.sqrt(rank) if stated.get("use_rslora") else alpha / rank
        first, second = (files.tensor(half).view(FLOATS[half.dtype]).copy() for half in (a, b))
        found[name] = LowRank(first, second, scale)
    return found


def _read_config(folder: Place) -> dict[str, Any]:
    try:
        stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no {CONFIG} in {folder}: pass the directory that PEFT's save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read as JSON ({error}): copy it again") from error
    kind = stated.get("peft_type") if isinstance(stated, dict) else None
    if kind != "LORA" or isinstance(stated.get("lora_alpha"), bool) or not isinstance(stated.get("lora_alpha"), (int, float)):
        raise UserError(f"{folder / CONFIG} has peft_type {kind!r} and lora_alpha {stated.get('lora_alpha') if kind else None!r}: only LORA is read")
    if stated.get("bias", "none") != "none":
        raise UserError(f"{folder / CONFIG} has bias {stated['bias']!r}, which is not supported: it must be 'none'")
    for field in UNSUPPORTED:
        if stated.get(field):
            raise UserError(f"{folder / CONFIG} has {field} = {stated[field]!r}, which is not supported: merge it with peft (merge_and_unload)")
    return stated


def _patterned(patterns: Any, module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name from its end, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


class Merge:
    """Adds an adapter to the parameters that it is called with: the sum in float32, rounded to the parameter's own dtype."""

    def __init__(self, adapter: Adapter, config: ModelConfig):
        self._adapter = adapter
        self._pieces: dict[Path_, list[Piece]] = {}
        for piece in name_table(config):
            if piece.name in adapter:
                self._pieces.setdefault(piece.path, []).append(piece)

    def __call__(self, path: Path_, parameter: np.ndarray) -> np.ndarray:
        if path in self._pieces and not parameter.flags.writeable:
            parameter = parameter.copy()
        for piece in self._pieces.get(path, ()):
            block = parameter[piece.index or ...]
            with np.errstate(all="ignore"):  # what no longer fits into the dtype is found afterwards
                block[...] = (block.astype(np.float32) + piece.load(self._adapter[piece.name].delta())).astype(parameter.dtype)
        return parameter


def save_adapter(adapter: Adapter, folder: str | Place, *, base: str = "") -> Place:
    """Writes the adapter as directory `folder`, which PEFT loads onto the base model; whole or not there.

    Ranks may differ from weight to weight.

    Args:
      base: the base model's name or directory, which adapter_config.json states.

    Raises UserError where `folder` exists or cannot be written, or the adapter is empty or of more dtypes than one.
    """
    dtypes = {np.dtype(half.dtype) for pair in adapter.values() for half in (pair.a, pair.b)}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS.values()):
        raise UserError(f"an adapter of {', '.join(sorted(d.name for d in dtypes)) or 'nothing'} cannot be saved: make it one floating-point type")
    word = next(word for word, kind in FLOATS.items() if kind in dtypes)
    modules = {name: in_memory(name).removesuffix(".weight") for name in sorted(adapter)}
    ranks = {module: adapter[name].a.shape[0] for name, module in modules.items()}
    alphas = {module: adapter[name].scale * ranks[module] for name, module in modules.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    stated = {
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "target_modules": sorted(modules.values()),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    tensors = {}
    for name, module in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = adapter[name].a
        tensors[f"base_model.model.{module}.lora_B.weight"] = adapter[name].b
    with staged(at(folder)) as staging:
        write_file(staging.folder / WEIGHTS, [Outgoing(name, word, value.shape) for name, value in tensors.items()], tensors.values())
        (staging.folder / CONFIG).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
    return at(folder)
