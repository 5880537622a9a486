"""A checkpoint of a training run, as `train.py` writes it, read like any other: to go on from its weights alone, or to convert it.

    OUT/config.json                 the run's settings
    OUT/model/                      config.json, tokenizer.json, ...: what describes the model
    OUT/checkpoints/STEP/           trained/ (float32) and frozen/ (what is computed in): arrays by dotted path, layers stacked

Arrays are read by slices, a layer at a time; adapters are added to their weights on the way.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from svlm_jax.checkpoints.adapters import LowRank
from svlm_jax.checkpoints.names import name_table
from svlm_jax.checkpoints.orbax_form import MARK, Keep, library, quiet
from svlm_jax.checkpoints.plan import Path_, leaves, some
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.storage import Place, directory, is_remote
from svlm_jax.types import Params

MODEL, CHECKPOINTS = "model", "checkpoints"  # in a run's directory
PARTS = ("trained", "frozen")
HALVES = (".lora_a", ".lora_b")


def is_run(folder: Place) -> bool:
    """Whether `folder` is a whole checkpoint of a training run."""
    return (folder / PARTS[0]).is_dir() and (folder / MARK).is_file()


def last_step(folder: Place) -> Place:
    """The last whole checkpoint, where `folder` is a run's directory or that of its checkpoints; else `folder` itself."""
    for place in (folder / CHECKPOINTS, folder):
        steps = [each for each in place.iterdir() if each.name.isdecimal() and is_run(each)] if place.is_dir() else []
        if steps:
            return max(steps, key=lambda step: int(step.name))
    return folder


def described_in(folder: Place) -> Place:
    """Where config.json and tokenizer files of the checkpoint in `folder` are: beside the weights, but for a training run's."""
    if not is_run(folder) or (folder / "config.json").is_file():
        return folder
    return folder.resolve().parent.parent / MODEL


class RunSource:
    """A training run's checkpoint, its shapes checked against the config, to be read in groups of parameters."""

    quantization = None

    def __init__(self, folder: Place, config: ModelConfig, *, dtype: Any = None):
        """Raises UserError naming the first parameter that is missing, unexpected or of another shape."""
        self.folder, self._config = folder, config
        self.arrays: dict[str, tuple[str, tuple[int, ...], np.dtype]] = {}  # by dotted path: part, shape, dtype
        self.metadata: list[Any] = []  # Orbax's own, of every array
        for part in PARTS:
            for name, leaf in _metadata(folder / part).items():
                self.metadata.append(leaf)
                self.arrays[name] = (part, tuple(leaf.shape), np.dtype(leaf.dtype))
        wanted = {".".join(map(str, path)): leaf.shape for path, leaf in leaves(abstract_params(config, stacked=True))}
        self._adapted = {name.removesuffix(HALVES[0]) for name in self.arrays if name.endswith(HALVES[0])}
        have = {name for name in self.arrays if not name.endswith(HALVES)}
        for names, what in ((wanted.keys() - have, "lacks"), (have - wanted.keys(), "holds, against its config.json,")):
            if names:
                raise UserError(f"{folder} {what} parameter {some(names)}: it belongs to another model than {described_in(folder)}")
        for name, shape in wanted.items():
            if self.arrays[name][1] != shape:
                found, told = list(self.arrays[name][1]), described_in(folder) / "config.json"
                raise UserError(
                    f"parameter {name} in {folder} has shape {found}, but {told} describes {list(shape)}: use its own config.json"
                )
        self._scale = _adapter_scale(folder) if self._adapted else 0.0
        self.shapes = {path: leaf.shape for path, leaf in leaves(abstract_params(config))}
        frozen = [kind for part, _, kind in self.arrays.values() if part == "frozen"]
        self.dtype = np.dtype(dtype) if dtype is not None else frozen[0] if frozen else np.dtype(np.float32)
        self._open: dict[str, Any] = {}

    def expect(self, paths: Sequence[Path_]) -> None:
        """Nothing is read ahead of what is asked for."""

    def read(self, paths: Sequence[Path_]) -> dict[Path_, np.ndarray]:
        """These parameters, whole, as `dtype`."""
        with np.errstate(all="ignore"):  # what no longer fits into a narrower dtype becomes infinite
            return {path: self.block(path).astype(self.dtype, copy=False) for path in paths}

    def block(self, path: Path_, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a parameter, of a layer or of all layers stacked, as it is stored; adapters added in float32."""
        layer: tuple[int, ...] = ()
        if path[:2] == ("text", "layers") and len(path) == 4:
            layer, path = (int(path[2]),), (*path[:2], path[3])
        name = ".".join(map(str, path))
        if name not in self._adapted:
            return self._stored(name, (*layer, *index))
        if not layer:
            first, *rest = index or (slice(None),)
            counted = range(*first.indices(self.arrays[name][1][0]))
            return np.stack([self.block((*path[:2], i, path[2]), tuple(rest)) for i in counted])
        weight, (a, b) = (
            self._stored(name, layer).astype(np.float32),
            (self._stored(name + half, layer).astype(np.float32) for half in HALVES),
        )
        return (weight + (a @ b.reshape(len(b), -1)).reshape(weight.shape) * np.float32(self._scale))[index or ...]

    def adapter(self) -> dict[str, LowRank]:
        """The adapters alone, float32, by the canonical names of the weights that they belong to.

        A product that is one parameter here and several weights there (q, k and v; gate and up) has one A, which each of these gets.
        UserError where the run trained none.
        """
        if not self._adapted:
            raise UserError(f"{self.folder} holds no adapters: those of a run with step.lora.rank above 0 are written in PEFT's form")
        found = {}
        for piece in name_table(self._config):
            *outer, product = map(str, piece.path)
            name = ".".join([*outer[:2], product])
            if name not in self._adapted:
                continue
            a, b = (self._stored(name + half, (int(outer[2]),)) for half in HALVES)
            block = b[piece.index or ...]  # rank stands where the inputs do in a weight
            found[piece.name] = LowRank(np.ascontiguousarray(a.T), np.ascontiguousarray(block.reshape(len(b), -1).T), self._scale)
        return found

    def _stored(self, name: str, index: tuple[Any, ...]) -> np.ndarray:
        import tensorstore  # Orbax's own store

        try:
            if name not in self._open:
                part = (self.folder / self.arrays[name][0]).resolve()
                base = str(part) if is_remote(part) else f"file://{part}"
                spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base}, "path": name}
                self._open[name] = tensorstore.open(spec, open=True).result()
            return np.asarray(self._open[name][index or ...].read().result())
        except ValueError as error:
            raise UserError(f"{name} in {self.folder} cannot be read ({str(error)[:200]}): copy the checkpoint again") from error


def load_run(
    folder: Place, config: ModelConfig, *, dtype: Any, stacked: bool, places: Mapping[Path_, Any], keep: Keep, progress: Any = None
) -> Params:
    """The parameters of `folder` on their devices; each device's part alone is read (of adapted weights a layer at a time).

    Args:
      places: the sharding of every parameter, in the layout that is asked for; None is the default device.
      keep: what is kept of a parameter, by itself, once it is on its devices.
    """
    source = RunSource(folder, config, dtype=dtype)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = [(path, leaf.shape) for path, leaf in leaves(abstract_params(config, stacked=stacked))]
    total, done = sum(math.prod(shape) for _, shape in shapes) * source.dtype.itemsize, 0
    params: Any = {}
    for path, shape in shapes:

        def part(index: Any, path: Path_ = path) -> np.ndarray:
            return source.block(path, index).astype(source.dtype, copy=False)

        at = params
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = keep(path, jax.block_until_ready(jax.make_array_from_callback(shape, places[path] or default, part)))
        done += math.prod(shape) * source.dtype.itemsize
        if progress is not None:
            progress(done, total)
    return params


def files_of(folder: Place) -> Iterator[Place]:
    """The files that hold the parameters."""
    for part in PARTS:
        yield from sorted(file for file in (folder / part).rglob("*") if file.is_file())


def _metadata(folder: Place) -> dict[str, Any]:
    if not folder.is_dir():  # nothing is frozen
        return {}
    library()  # or a word on what to install
    import orbax.checkpoint as ocp

    try:
        with quiet(), ocp.StandardCheckpointer() as reader:
            found: Any = reader.metadata(directory(folder))
        return dict(getattr(found, "item_metadata", found))
    except (ValueError, KeyError, OSError, TypeError) as error:  # the last where it names no arrays
        raise UserError(f"{folder} cannot be read ({' '.join(str(error).split())[:200]}): copy the checkpoint again") from error


def settings_of(folder: Place) -> Place:
    """Where the settings are of the run that the checkpoint in `folder` belongs to."""
    return folder.resolve().parent.parent / "config.json"


def base_of(folder: Place) -> str:
    """The weights that the run of a checkpoint began with, a name or a directory; "" where that is not known."""
    try:
        return str(json.loads(settings_of(folder).read_text(encoding="utf-8"))["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _adapter_scale(folder: Place) -> float:
    file = settings_of(folder)
    try:
        lora = json.loads(file.read_text(encoding="utf-8"))["step"]["lora"]
        return float(lora["alpha"]) / int(lora["rank"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder} holds adapters, and {file} does not say how they are scaled (step.lora): copy it from the run"
        ) from error
