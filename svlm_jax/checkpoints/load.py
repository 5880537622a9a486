"""Reads a checkpoint, in Hugging Face's form, Orbax's or a training run's, straight into the parameters' layout and sharding, without PyTorch.

The host holds one parameter at a time (and the one before it, while that travels to its device), never the model. The directory may
be in a bucket: then what the host's devices need of each tensor is read from there, and nothing is copied to a disk.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from svlm_jax.bucket_path import BucketPath
from svlm_jax.checkpoints.copying import COPIERS, fill
from svlm_jax.checkpoints.fetched import Fetched, reader
from svlm_jax.checkpoints.hub_config import read_config
from svlm_jax.checkpoints.orbax_form import OrbaxSource, is_orbax, load_orbax
from svlm_jax.checkpoints.plan import PICKLES, Path_, Target, leaves, plan, weight_files
from svlm_jax.checkpoints.run_form import described_in, is_run, last_step, load_run
from svlm_jax.checkpoints.safetensors_file import FLOATS, Box, Mapped
from svlm_jax.checkpoints.staging import refuse_unfinished
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.heads import PARTS, repeat_compiled, repeated, repeats
from svlm_jax.model.quantized import Quantization, Quantized, as_quantization, narrowed, quantize_weight
from svlm_jax.model.quantized import quantize as quantize_params
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.sharding import param_shardings
from svlm_jax.storage import Place, at
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Array, Params

Progress = Callable[[int, int], None]  # bytes done, bytes in total
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    config: ModelConfig  # of `params`: on a mesh, key-value heads may be repeated
    params: Params
    tokenizer: Tokenizer
    path: Place  # the directory it came from


def load(
    path: str | Place,
    *,
    dtype: Any = None,
    stacked: bool = False,
    shardings: Any = None,
    quantize: str | Quantization | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """The model in a directory of Hugging Face's or Orbax's form, or the one of that name (`org/name`) in the local Hub cache or on the Hub.

    With a `mesh` it is spread over that, to be served (`load_on_mesh`). The other keywords are those of `load_params`. Raises UserError,
    one line, for whatever is wrong with the checkpoint.
    """
    folder, name = find(path)
    config = read_config(folder, name=name)
    tokenizer = Tokenizer.load(described_in(folder))
    if tokenizer.vocab_size > config.text.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model embeds {config.text.vocab_size}: "
            "use the tokenizer files that belong to these weights"
        )
    if mesh is not None:
        assert shardings is None and not stacked, "a mesh says where parameters go"
        params = load_on_mesh(folder, config, mesh, dtype=dtype, quantize=quantize, progress=progress)
        return LoadedModel(on_mesh(config, mesh), params, tokenizer, folder)
    params = load_params(folder, config, dtype=dtype, stacked=stacked, shardings=shardings, quantize=quantize, progress=progress)
    return LoadedModel(config, params, tokenizer, folder)


def on_mesh(config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> ModelConfig:
    """The model as it is served on a mesh: key-value heads are repeated where there are fewer than shards. UserError where that cannot be."""
    return config if mesh is None else repeated(config, repeats(config, mesh.shape["tensor"]))


def load_on_mesh(
    path: str | Place,
    config: ModelConfig,
    mesh: Mesh,
    *,
    dtype: Any = None,
    quantize: str | Quantization | None = None,
    progress: Progress | None = None,
) -> Params:
    """The parameters of `on_mesh(config, mesh)`, cut over the mesh, from the checkpoint in directory `path`, whose config is `config`."""
    times, places = repeats(config, mesh.shape["tensor"]), dict(leaves(param_shardings(on_mesh(config, mesh), mesh)))
    kept = OrbaxSource(at(path), config, dtype=dtype).quantization if times > 1 and is_orbax(at(path)) else None
    if kept is not None:
        raise UserError(
            f"{path} holds weights in {kept.kind}, and the key-value heads of such weights are not repeated: choose tensor from the divisors of "
            f"{config.text.num_key_value_heads}, or take the checkpoint they were made from with --quantize {kept.kind}"
        )

    def change(name: Path_, array: Array) -> Array:
        if times == 1 or name[:2] != ("text", "layers") or name[-1] not in PARTS:
            return array
        return jax.device_put(repeat_compiled(name[-1], array, times), places[name])

    return load_params(
        path, config, dtype=dtype, shardings=param_shardings(config, mesh), quantize=quantize, change=change, progress=progress
    )


def find(path: str | Place) -> tuple[Place, str]:
    """(directory, model's name) of a checkpoint: a directory as it is; `org/name` through `huggingface_hub`, its cache first.

    A training run's directory is its last checkpoint.
    """
    folder = at(path).expanduser()
    if isinstance(folder, BucketPath):
        refuse_unfinished(folder)
    if folder.is_dir():
        folder = last_step(folder)
        whole = folder.resolve()
        return folder, f"{whole.parent.parent.name}-{whole.name}" if is_run(folder) else whole.name
    name = str(path)
    if folder.suffix in PICKLES and folder.is_file():
        raise UserError(f"{name} is a pickle, which may run any code when it is opened: pass a directory with safetensors")
    if isinstance(folder, BucketPath):
        raise UserError(f"there is nothing in {name}: pass the directory that a Hugging Face model was uploaded to")
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name} is not a directory: pass the one that a Hugging Face model was downloaded to")
    mend = f"download it (`hf download {name} --local-dir DIR`) and pass the directory"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{name} is not a directory here, and huggingface_hub is not installed to look on the Hub: {mend}") from error
    try:
        found = Path(huggingface_hub.snapshot_download(name, local_files_only=True, allow_patterns=HUB_FILES))
        weight_files(found)  # the cache may hold a part of the model only
        return found, name.split("/")[1]
    except Exception:  # not in the cache, or not all of it
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES)), name.split("/")[1]
    except Exception as error:  # the client raises its own errors, its HTTP library's, and OSError
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{name} is not a directory here, and could not be had from the Hub ({reason}): {mend}") from error


def load_params(
    path: str | Place,
    config: ModelConfig,
    *,
    dtype: Any = None,
    stacked: bool = False,
    shardings: Any = None,
    quantize: str | Quantization | None = None,
    change: Callable[[Path_, Array], Array] | None = None,
    progress: Progress | None = None,
) -> Params:
    """The parameters of the checkpoint in directory `path`, laid out as `model.qwen_vl.init_params` lays them out.

    Args:
      dtype: of the parameters; None keeps what the files hold.
      stacked: whether the decoder's layers become one stacked layer.
      shardings: where parameters go: None (the default device), one `jax.Device` or `jax.sharding.Sharding` for all, or a
        tree of shardings like the parameters. Each shard is read on its own, from the bytes that it needs.
      quantize: which weights to keep in eight bits, "int8", "fp8" or "fp8_products" for the default ones: each is made so as soon as it
        is on its devices. A checkpoint that holds them so already is read as it is.
      change: what becomes of each parameter once it is on its devices, before it is made eight bits.
      progress: called with (bytes done, bytes in total) after every parameter.

    Raises UserError, before anything is allocated, where files and config do not match in every tensor.
    """
    places, wanted = _places(config, stacked, shardings), as_quantization(quantize)
    tied = config.text.tie_word_embeddings

    def keep(path: Path_, array: Any) -> Any:
        if isinstance(array, Quantized):
            axes = wanted.inputs(path, array.values.ndim, tied=tied) if wanted is not None and wanted.narrow(path) else None
            return array if axes is None else narrowed(array, axes)
        array = array if change is None else change(path, array)
        axes = None if wanted is None else wanted.inputs(path, array.ndim, tied=tied)
        return array if wanted is None or axes is None else quantize_weight(array, wanted.stored, axes, narrow=wanted.narrow(path))

    folder = at(path)
    if is_orbax(folder):
        kept = OrbaxSource(folder, config, dtype=dtype).quantization
        if kept is not None and wanted is not None and not (wanted.stored == kept.kind and set(kept.parts) <= set(wanted.parts)):
            parts = ", ".join(kept.parts)
            raise UserError(f"{path} holds {parts} in {kept.kind} already: leave the quantization out, or take the checkpoint before it")
        if kept is None and wanted is not None and stacked:  # layers are read one by one, and stacked at the end
            whole = load_params(path, config, dtype=dtype, stacked=True, shardings=shardings, change=change, progress=progress)
            return quantize_params(whole, wanted)
        return load_orbax(folder, config, dtype=dtype, stacked=stacked, places=places, progress=progress, keep=keep)
    if is_run(folder):
        return load_run(folder, config, dtype=dtype, stacked=stacked, places=places, progress=progress, keep=keep)
    targets = plan(folder, config, dtype=dtype, stacked=stacked)
    params: Params = {}
    total, done, files = sum(target.nbytes for target in targets), 0, reader(folder)
    previous: Array | None = None
    with ThreadPoolExecutor(COPIERS) as pool:
        for target in targets:
            array = _fill(target, places[target.path], files, pool)
            if previous is not None:
                previous.block_until_ready()  # host memory of a parameter is free once it has arrived
            previous = array
            _put(params, target.path, keep(target.path, array))
            done += target.nbytes
            if progress is not None:
                progress(done, total)
    jax.block_until_ready(params)
    return params


def _places(config: ModelConfig, stacked: bool, shardings: Any) -> dict[Path_, Any]:
    """The sharding of every parameter; None is the default device."""
    if isinstance(shardings, jax.Device):
        shardings = jax.sharding.SingleDeviceSharding(shardings)
    abstract = abstract_params(config, stacked=stacked)
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return {path: shardings for path, _ in leaves(abstract)}
    return dict(leaves(jax.tree.map(lambda _, sharding: sharding, abstract, shardings)))


def _fill(target: Target, sharding: jax.sharding.Sharding | None, files: Mapped | Fetched, pool: Executor) -> Array:
    """The parameter on its devices. Of files, one shard at a time is assembled on the host; of objects all of its own, to read each once."""
    if sharding is None:
        return jax.device_put(assemble(target, [whole(target.shape)], files, pool)[0])
    shards: dict[tuple, list[Any]] = {}  # devices by the box that they hold: replicas are read once
    for device, index in sharding.addressable_devices_indices_map(target.shape).items():
        box = tuple(part.indices(n)[:2] for part, n in zip(index or (), target.shape, strict=True))
        shards.setdefault(box, []).append(device)
    arrays, boxes = [], [tuple(slice(*part) for part in box) for box in shards]
    blocks = itertools.chain.from_iterable(assemble(target, some, files, pool) for some in ([[box] for box in boxes] if files.one_by_one else [boxes]))
    for block, devices in zip(blocks, shards.values(), strict=True):
        arrays += [jax.device_put(block, device) for device in devices]
    return jax.make_array_from_single_device_arrays(target.shape, sharding, arrays)


def whole(shape: tuple[int, ...]) -> Box:
    """All of an array."""
    return tuple(slice(0, n) for n in shape)


def assemble(target: Target, boxes: Sequence[Box], files: Mapped | Fetched, pool: Executor) -> list[np.ndarray]:
    """Parts of a parameter, put together from its tensors."""
    out = [np.empty([part.stop - part.start for part in box], target.dtype) for box in boxes]
    for block in target.blocks:
        filled = block.box(target.shape)
        shared = {i: common for i, box in enumerate(boxes) if (common := _intersection(box, filled)) is not None}
        if not shared:
            continue
        piece, stored = block.piece, FLOATS[block.stored.dtype]
        inner = {i: _within(common, filled)[len(filled) - len(piece.split) :] for i, common in shared.items()}  # without the layer's axis
        source = piece.load(files.tensor(block.stored, piece.split, [piece.source_box(box) for box in inner.values()]))
        for i, common in shared.items():
            place, part = out[i][_within(common, boxes[i])], source[inner[i]]
            place = place[(0,) * (place.ndim - part.ndim)]
            if stored == target.dtype:
                place = place.view(part.dtype)  # plain integers, which are copied faster
            else:
                part = part.view(stored)
            fill(place, part, pool, copied=functools.partial(files.release, block.stored))
    return out


def _intersection(one: Box, two: Box) -> Box | None:
    """What both have; None where that is nothing."""
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, two, strict=True))
    return None if any(part.start >= part.stop for part in common) else common


def _within(box: Box, outer: Box) -> Box:
    """A part of `outer`, counted from where that begins."""
    return tuple(slice(part.start - start.start, part.stop - start.start) for part, start in zip(box, outer, strict=True))


def _put(params: Any, path: Path_, array: Any) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = array
