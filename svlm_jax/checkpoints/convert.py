"""From one form of a checkpoint to the other, or to another dtype, in memory that does not grow with the model."""

import dataclasses
import json
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from svlm_jax.checkpoints.adapters import LowRank, Merge, read_adapter, save_adapter
from svlm_jax.checkpoints.hub_config import is_text_only, read_config
from svlm_jax.checkpoints.load import find
from svlm_jax.checkpoints.orbax_form import GROUP_BYTES, SAVED_TOGETHER, eight_bits, is_orbax, library, write_orbax
from svlm_jax.checkpoints.plan import Path_
from svlm_jax.checkpoints.run_form import RunSource, base_of, described_in, is_run
from svlm_jax.checkpoints.safetensors_file import FLOATS
from svlm_jax.checkpoints.save import Progress, copy_companions, write_json, write_weights
from svlm_jax.checkpoints.source import Parameters, finite, open_source
from svlm_jax.checkpoints.staging import refuse_existing, staged
from svlm_jax.checkpoints.text_only import TextWithTower
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import Quantization, as_quantization, quantized_shapes
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.storage import Place, at, is_remote

Form = Literal["hf", "orbax", "peft"]
TITLES = {"hf": "Hugging Face's form", "orbax": "Orbax's form", "peft": "PEFT's form", "run": "a training run's form"}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Place
    form: Form
    dtype: np.dtype
    parameters: int  # numbers
    nbytes: int  # of all parameters
    quantization: Quantization | None = None


def convert(
    source: str | Place,
    target: str | Place,
    *,
    form: Form | None = None,
    dtype: Any = None,
    adapter: str | Place | None = None,
    vision_from: str | Place | None = None,
    quantize: str | Quantization | None = None,
    shard_bytes: float = 5e9,
    progress: Progress | None = None,
) -> Converted:
    """Writes the checkpoint `source` as directory `target`, which is whole or not there. Both may be in buckets.

    Args:
      source: a directory of either form, a training run's or one of its checkpoints, or a name on the Hub.
      form: of the target; None is the form that the source does not have, Hugging Face's of a training run. "peft" is the adapters
        alone of a run that trained some.
      dtype: of the target; None keeps every bit, but for what a training run trained in float32 beside frozen weights: it takes their dtype.
      adapter: a LoRA adapter's directory, in PEFT's format, that is merged into the weights.
      vision_from: where the source is text-only, and only there: the checkpoint that gives the vision tower, config.json, tokenizer and the like.
      quantize: which weights are kept in eight bits, "int8" or "fp8" for the default ones; in Orbax's form alone.
      shard_bytes: a safetensors file's size at most.
      progress: called with (bytes done, bytes in total); bytes for a bucket count when they are written here, and when they are sent.

    Raises UserError for whatever is wrong with the source, or where the target exists or cannot be written.
    """
    target = at(target).expanduser()
    refuse_existing(target)
    folder, _ = find(source)
    small = as_quantization(quantize)
    if form == "peft":
        if adapter is not None:
            raise UserError(f"{adapter} cannot be merged into adapters alone: convert the weights with it, or the run without")
        if small is not None:
            raise UserError("adapters alone are not written in eight bits: choose another dtype")
        return _adapters_alone(folder, read_config(folder), target, dtype)
    if small is not None and small.stored != small.kind:
        raise UserError(f"{small.kind} is how weights are used: convert them to {small.stored}, and start with --quantize {small.kind}")
    if small is not None and form == "hf":
        raise UserError("weights in eight bits are written in Orbax's form alone: leave --to hf out")
    form = form or ("orbax" if small is not None else "hf" if is_orbax(folder) or is_run(folder) else "orbax")
    if form == "orbax":
        library()  # an error now, rather than after the first gigabyte
    if vision_from is None:
        about, config = folder, read_config(folder)
        opened = open_source(folder, config, dtype=dtype)
    else:
        if not is_text_only(folder):
            raise UserError(f"{folder} is not text-only, so its vision tower is its own: leave --vision-from out")
        about, _ = find(vision_from)
        config = read_config(about)
        opened = TextWithTower(folder, open_source(about, config, dtype=dtype), config, dtype=dtype)
    if opened.quantization is not None and (dtype is None or small is not None):
        raise UserError(
            f"{folder} holds weights in {opened.quantization.kind} already, and what was lost on the way does not come back: "
            "say which dtype to widen them to (--dtype bfloat16), or take the checkpoint they were made from"
        )
    if opened.dtype not in FLOATS.values():
        raise UserError(f"{opened.dtype.name} cannot be written: choose {', '.join(kind.name for kind in FLOATS.values())}")
    count = sum(math.prod(shape) for shape in opened.shapes.values())
    stored = jax.tree.leaves(quantized_shapes(abstract_params(config, dtype=opened.dtype), small))
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stored)
    merge = None if adapter is None else Merge(read_adapter(adapter, config), config)
    parameters = Parameters(opened, config, merge, together=SAVED_TOGETHER if form == "orbax" else GROUP_BYTES)
    tally = _Tally(total * 2 if is_remote(target) else total, progress)
    # Of what goes to a bucket, a file that is on its way and the next are here at once; Orbax's files are done when the last array is
    room = min(total, 2 * int(shard_bytes)) if is_remote(target) and form == "hf" else total
    with staged(target, need=room, sent=tally) as staging:
        if form == "orbax":
            groups = parameters.groups()
            if small is not None:
                groups = (eight_bits(group, small, tied=config.text.tie_word_embeddings) for group in groups)
            write_orbax(staging.folder, _counted(groups, tally))
        else:
            write_weights(parameters.get, config, staging, opened.dtype, shard_bytes=shard_bytes, written=tally)
        copy_companions(described_in(about), staging.folder)
        write_json(staging.folder / "config.json", _described(described_in(about), opened.dtype))
    tally.finish()
    return Converted(target, form, opened.dtype, count, total, small)


def _adapters_alone(folder: Place, config: ModelConfig, target: Place, dtype: Any) -> Converted:
    if not is_run(folder):
        raise UserError(f"{folder} is no training run's checkpoint: adapters in PEFT's form are made of a run with step.lora.rank above 0")
    kind = np.dtype(np.float32 if dtype is None else dtype)
    pairs: dict[str, LowRank] = {}
    for name, pair in RunSource(folder, config).adapter().items():
        with np.errstate(all="ignore"):  # what no longer fits into the dtype is found below
            pairs[name] = dataclasses.replace(pair, a=pair.a.astype(kind), b=pair.b.astype(kind))
        if not (finite(pairs[name].a) and finite(pairs[name].b)):
            raise UserError(
                f"the adapter of {name} holds numbers that are not finite as {kind.name}: take an earlier checkpoint, or a wider dtype"
            )
    count = sum(pair.a.size + pair.b.size for pair in pairs.values())
    return Converted(save_adapter(pairs, target, base=base_of(folder)), "peft", kind, count, count * kind.itemsize)


class _Tally:
    """Bytes that are done, told one by one as they are; all of them at the end alone. Threads may tell at once."""

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done, self._lock = total, progress, 0, threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done = min(self._done + count, self._total - 1)
            if self._progress is not None:
                self._progress(self._done, self._total)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)


def _counted(groups: Iterable[dict[Path_, np.ndarray]], tally: _Tally) -> Iterator[dict[Path_, np.ndarray]]:
    for group in groups:
        size = sum(array.nbytes for array in group.values())
        yield group
        group.clear()
        tally(size)


def _described(folder: Place, dtype: np.dtype) -> dict[str, Any]:
    """The source's config.json, with the dtype that the weights now have."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = [content, *(content[key] for key in ("text_config", "vision_config") if isinstance(content.get(key), dict))]
    for part in parts:
        part.update({key: dtype.name for key in ("torch_dtype", "dtype") if part.get(key) is not None})
    if not any(part.get(key) is not None for part in parts for key in ("torch_dtype", "dtype")):
        content["torch_dtype"] = dtype.name
    return content
