"""A checkpoint in Orbax's format: the parameter tree as it is in memory, one array for each parameter.

    config.json, tokenizer.json, ...    as in the Hugging Face form
    params/                             an Orbax checkpoint of the nested dict of parameters, layers apart and not stacked

A weight in eight bits (`model.quantized`) is a dict of its `values` and its `scale`.
Arrays are cut into chunks, so that a device reads little more than its shard.
"""

import contextlib
import functools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from svlm_jax.checkpoints.layouts import to_stacked
from svlm_jax.checkpoints.plan import Path_, leaves, some
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import KINDS, Quantization, Quantized, cut, parts_of, quantize_weight, quantized_shapes
from svlm_jax.model.qwen_vl import abstract_params, is_stacked
from svlm_jax.storage import Place, directory
from svlm_jax.types import Params

PARAMS = "params"
Keep = Callable[[Path_, Any], Any]  # what is kept of a parameter that has been read: an array, or a weight in eight bits
CHUNK_BYTES = 32 << 20
VALUES, SCALE = "values", "scale"  # of a weight in eight bits
GROUP_BYTES = 512 << 20  # of parameters read together
SAVED_TOGETHER = 768 << 20  # bytes of parameters: each partial save reads and writes the names of all that were saved before
MARK = "_CHECKPOINT_METADATA"  # Orbax's own, in every finished checkpoint


def is_orbax(folder: Place) -> bool:
    """Whether `folder` is a checkpoint in this form."""
    return (folder / PARAMS / MARK).is_file()


@functools.cache
def library() -> Any:
    """Orbax, which takes seconds to import and which captioning does without."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own imports' deprecations
            from orbax.checkpoint import v1
    except ImportError as error:
        raise UserError("checkpoints in Orbax's format need the package orbax-checkpoint: pip install orbax-checkpoint") from error
    # At the first array that cannot be read Orbax closes its event loop. Every other read then ends in a traceback, in its thread or in the log
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(found.exc_value)):
            before(found)

    sys.unraisablehook = hook
    return v1


class OrbaxSource:
    """A checkpoint in Orbax's format, its shapes checked against the config, to be read in groups of parameters."""

    def __init__(self, folder: Place, config: ModelConfig, *, dtype: Any = None):
        """Raises UserError naming the first parameter that is missing, unexpected or of another shape."""
        self.folder = folder
        stored = {_words(path): leaf for path, leaf in leaves(_metadata(folder))}
        abstract = {path: leaf.shape for path, leaf in leaves(abstract_params(config))}
        small = [path for path in abstract if (*_words(path), VALUES) in stored]
        self.quantization = _quantization(folder, [stored[*_words(path), VALUES].dtype for path in small], parts_of(small))
        self._tied = config.text.tie_word_embeddings
        arrays = {path: leaf.shape for path, leaf in leaves(_apart(quantized_shapes(abstract_params(config), self.quantization)))}
        names = {_words(path): path for path in arrays}
        dotted = {".".join(words) for words in names.keys() - stored.keys()}
        if dotted:
            raise UserError(f"{folder} lacks parameter {some(dotted)}, which config.json calls for: convert it again, or use its own config.json")
        dotted = {".".join(words) for words in stored.keys() - names.keys()}
        if dotted:
            raise UserError(f"{folder} holds parameter {some(dotted)}, which no model of this config.json has: use its own config.json")
        self.dtypes: dict[Path_, np.dtype] = {}
        for words, path in names.items():
            found = tuple(stored[words].shape)
            if found != arrays[path]:
                raise UserError(
                    f"parameter {'.'.join(words)} in {folder} has shape {list(found)}, but config.json describes {list(arrays[path])}: "
                    "use its own config.json"
                )
            self.dtypes[path] = np.dtype(stored[words].dtype)
        self.shapes, self._arrays = abstract, arrays
        self.dtype = np.dtype(dtype) if dtype is not None else self._one_dtype()

    def _one_dtype(self) -> np.dtype:
        plain = {path: dtype for path, dtype in self.dtypes.items() if path[-1] not in (VALUES, SCALE)}
        kinds = sorted({dtype.name for dtype in plain.values()})
        if len(kinds) > 1:
            raise UserError(f"{self.folder} holds parameters of {', '.join(kinds)}: say which dtype to load")
        return next(iter(plain.values()))

    def summed(self, path: Path_) -> tuple[int, ...] | None:
        """The axes that products sum over, of a weight in eight bits; None of any other parameter."""
        return None if self.quantization is None else self.quantization.inputs(path, len(self.shapes[path]), tied=self._tied)

    def arrays(self, path: Path_) -> dict[Path_, tuple[int, ...]]:
        """The arrays that a parameter is stored as, and their shapes: itself, or its values and their scale."""
        kept = [path] if self.summed(path) is None else [(*path, VALUES), (*path, SCALE)]
        return {array: self._arrays[array] for array in kept}

    def expect(self, paths: Sequence[Path_]) -> None:
        """Nothing is read ahead of what is asked for."""

    def read(self, paths: Sequence[Path_]) -> dict[Path_, np.ndarray]:
        """These parameters, whole, as `dtype`; eight bits times their scale, where they are kept so."""
        # Orbax makes an array of what it is shown: a view of one number takes no memory
        arrays = {array: shape for path in paths for array, shape in self.arrays(path).items()}
        wanted = [(array, np.broadcast_to(np.zeros((), self.dtypes[array]), shape)) for array, shape in arrays.items()]
        stored = dict(leaves(_read(self.folder, _tree(wanted))))

        def whole(path: Path_) -> np.ndarray:
            axes, words = self.summed(path), _words(path)
            if axes is None:
                return stored.pop(words)
            return stored.pop((*words, VALUES)).astype(np.float32) * np.expand_dims(stored.pop((*words, SCALE)), axes)

        with np.errstate(all="ignore"):  # what no longer fits into a narrower dtype becomes infinite
            return {path: whole(path).astype(self.dtype, copy=False) for path in paths}


def _quantization(folder: Place, dtypes: Sequence[Any], parts: tuple[str, ...]) -> Quantization | None:
    """What of the model is in eight bits, by the dtypes of the values."""
    if not dtypes:
        return None
    kind = next((kind for kind, (dtype, _) in KINDS.items() if all(np.dtype(found) == dtype for found in dtypes)), None)
    if kind is None:
        raise UserError(f"{folder} holds values of {some({np.dtype(found).name for found in dtypes})}, which must all be {' or '.join(KINDS)}")
    return Quantization(kind, parts)


def _apart(params: Any) -> Any:
    """The tree with the two arrays of every weight in eight bits as a dict."""
    if isinstance(params, dict):
        return {key: _apart(node) for key, node in params.items()}
    return {VALUES: params.values, SCALE: params.scale} if isinstance(params, Quantized) else params


def array_metadata(folder: Place) -> list[Any]:
    """Orbax's own, of every array."""
    return [leaf for _, leaf in leaves(_metadata(folder))]


def leaf_details(arrays: Iterable[Any]) -> list[tuple[np.dtype, int, int]]:
    """(dtype, chunks, numbers) of every array, from its metadata."""
    details = []
    for leaf in arrays:
        storage = leaf.storage_metadata
        chunk = storage.chunk_shape if storage is not None and storage.chunk_shape is not None else leaf.shape
        chunks = math.prod(-(-n // c) for n, c in zip(leaf.shape, chunk, strict=True))
        details.append((np.dtype(leaf.dtype), chunks, math.prod(leaf.shape)))
    return details


def load_orbax(
    folder: Place, config: ModelConfig, *, dtype: Any, stacked: bool, places: Mapping[Path_, Any], keep: Keep, progress: Any = None
) -> Params:
    """The parameters of `folder` on their devices; each device's chunks alone are read.

    Args:
      places: the sharding of every parameter, in the layout that is asked for; None is the default device.
      keep: what is kept of a parameter, by itself, once it is on its devices.
    """
    source = OrbaxSource(folder, config, dtype=dtype)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: Params = {}
    if stacked and source.quantization is not None:
        raise UserError(f"{folder} holds weights in {source.quantization.kind}, which are not for training: take the checkpoint they were made from")

    def shown(path: Path_) -> list[tuple[Path_, jax.ShapeDtypeStruct]]:
        """The arrays of a parameter as they shall come: eight bits as they are, and cut as the weight would be."""
        sharding, axes = _place(path, places, stacked) or default, source.summed(path)
        if axes is None:
            return [(path, jax.ShapeDtypeStruct(source.shapes[path], source.dtype, sharding=sharding))]
        two = cut(sharding, axes, len(source.shapes[path])) if isinstance(sharding, NamedSharding) else Quantized(sharding, sharding)
        arrays = zip(source.arrays(path).items(), (two.values, two.scale), strict=True)
        return [(array, jax.ShapeDtypeStruct(shape, source.dtypes[array], sharding=place)) for (array, shape), place in arrays]

    def nbytes(path: Path_) -> int:
        return sum(math.prod(shape) * source.dtypes[array].itemsize for array, shape in source.arrays(path).items())

    total, done = sum(nbytes(path) for path in source.shapes), 0
    for group in grouped(source.shapes, source.dtype.itemsize):
        found = dict(leaves(_read(folder, _tree(one for path in group for one in shown(path)))))
        for path in group:
            words = _words(path)
            if source.summed(path) is None:
                _put(params, path, keep(path, found.pop(words)))
            else:
                _put(params, path, keep(path, Quantized(found.pop((*words, VALUES)), found.pop((*words, SCALE)))))
            done += nbytes(path)
        if progress is not None:
            progress(done, total)
    jax.block_until_ready(params)
    assert not is_stacked(params)
    return to_stacked(params) if stacked else params


def eight_bits(group: Mapping[Path_, np.ndarray], quantization: Quantization, *, tied: bool) -> dict[Path_, np.ndarray]:
    """The arrays that parameters are stored as where the chosen ones are kept in eight bits."""
    found: dict[Path_, np.ndarray] = {}
    for path, array in group.items():
        axes = quantization.inputs(path, array.ndim, tied=tied)
        if axes is None:
            found[path] = array
        else:
            small = quantize_weight(jax.numpy.asarray(array), quantization.kind, axes)
            found |= {(*path, VALUES): np.asarray(small.values), (*path, SCALE): np.asarray(small.scale)}
    return found


def _place(path: Path_, places: Mapping[Path_, Any], stacked: bool) -> Any:
    """The sharding of a parameter by itself, where the layout may be that of stacked layers."""
    if not (stacked and path[:2] == ("text", "layers")):
        return places[path]
    sharding = places[("text", "layers", path[-1])]
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    return sharding


def grouped(shapes: Mapping[Path_, tuple[int, ...]], itemsize: int, limit: int = GROUP_BYTES) -> list[list[Path_]]:
    """The parameters in groups of at most `limit` bytes, in order; layers and blocks stay whole, and larger parameters are alone."""
    units: dict[Path_, list[Path_]] = {}
    for path in shapes:
        units.setdefault(path[:3] if path[1] in ("layers", "blocks") else path, []).append(path)
    groups: list[list[Path_]] = [[]]
    held = 0
    for unit in units.values():
        size = itemsize * sum(math.prod(shapes[path]) for path in unit)
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1] += unit
        held += size
    return groups


def write_orbax(folder: Path, groups: Iterable[dict[Path_, np.ndarray]]) -> None:
    """Writes arrays, asked for group by group (an empty one: after all before), as `folder`/params. OSError where the disk cannot take them."""
    ocp = library()
    target = directory(folder / PARAMS)
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink, and what is not packed is read in place
    context.array.saving.use_ocdbt = False  # a file for each chunk instead of a few large ones: a copy and a checksum less of every byte
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory_options.deepcopy_host_arrays = False  # a group is written before it is let go, and nobody changes it

    def save(tree: Params) -> None:
        with context:
            ocp.partial.save(target, tree)

    with quiet(), ThreadPoolExecutor(1) as writer:
        saving: Future[None] | None = None
        try:
            for group in groups:  # the next one is read while this one goes to the disk
                if saving is not None:
                    saving.result()
                saving = writer.submit(save, _tree(group.items())) if group else None
            if saving is not None:
                saving.result()
            with context:
                ocp.partial.finalize(target)
        except UserError:
            raise
        except Exception as error:  # tensorstore raises ValueError for whatever the system says
            raise OSError(None, _reason(error)) from error


def _metadata(folder: Place) -> Any:
    ocp = library()
    try:
        with quiet():
            tree = ocp.metadata(directory(folder / PARAMS)).metadata
        if not isinstance(tree, dict):
            raise ValueError("its metadata names no parameters")
        return tree
    except Exception as error:
        raise UserError(f"{folder / PARAMS} cannot be read ({_reason(error)}): convert or copy it again") from error


def _read(folder: Place, tree: Params) -> Params:
    ocp = library()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with quiet(), context:
            return ocp.load(directory(folder / PARAMS), tree)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "No such" not in str(error):
            raise
        raise UserError(f"{folder / PARAMS} cannot be read ({_reason(error)}): convert or copy it again") from error


def _reason(error: BaseException) -> str:
    """What the innermost cause says, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    for known in ("No space left on device", "Permission denied", "Disk quota exceeded"):
        if known in text:
            return known
    return text if len(text) <= 200 else f"{text[:200]} ..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's warnings about its own parts; what is wrong with a checkpoint it raises as well."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _words(path: Path_) -> tuple[str, ...]:
    """Keys as Orbax has them: text."""
    return tuple(str(key) for key in path)


def _tree(items: Iterable[tuple[Path_, Any]]) -> Params:
    tree: Params = {}
    for path, leaf in items:
        _put(tree, _words(path), leaf)
    return tree


def _put(tree: Any, path: Path_, leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
