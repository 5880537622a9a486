"""Checkpoints on disk, of any form, whose parameters are read a group at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from svlm_jax.checkpoints.copying import COPIERS
from svlm_jax.checkpoints.fetched import reader
from svlm_jax.checkpoints.load import assemble, whole
from svlm_jax.checkpoints.names import Piece, name_table
from svlm_jax.checkpoints.orbax_form import GROUP_BYTES, OrbaxSource, grouped, is_orbax
from svlm_jax.checkpoints.plan import Path_, plan
from svlm_jax.checkpoints.run_form import RunSource, is_run
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.quantized import Quantization
from svlm_jax.storage import Place

AT_ONCE = 2  # parameters: one is copied while another's bookkeeping is done
COMPARED_AT_ONCE = 1 << 20  # numbers, which fit into the cache
EXPONENT = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}, 8: {"float64": 0x7FF0000000000000}}


class HubSource:
    """A checkpoint in Hugging Face's form, accounted for by its headers; without `tower`, one that has no vision tower."""

    quantization = None

    def __init__(self, folder: Place, config: ModelConfig, *, dtype: Any = None, tower: bool = True):
        self._targets = {target.path: target for target in plan(folder, config, dtype=dtype, tower=tower)}
        self.shapes = {path: target.shape for path, target in self._targets.items()}
        self.dtype = next(iter(self._targets.values())).dtype
        self._files = reader(folder)

    def read(self, paths: Sequence[Path_]) -> dict[Path_, np.ndarray]:
        """These parameters, whole, as `dtype`."""
        with ThreadPoolExecutor(COPIERS) as pool, ThreadPoolExecutor(AT_ONCE) as readers:

            def read(path: Path_) -> np.ndarray:
                return assemble(self._targets[path], [whole(self.shapes[path])], self._files, pool)[0]

            return dict(zip(paths, readers.map(read, paths), strict=True))

    def expect(self, paths: Sequence[Path_]) -> None:
        """Has the disk begin with them."""
        for path in paths:
            for block in self._targets[path].blocks:
                self._files.expect(block.stored)


@runtime_checkable
class Source(Protocol):
    """Where parameters are read from, those asked for whole."""

    @property
    def shapes(self) -> Mapping[Path_, tuple[int, ...]]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def quantization(self) -> Quantization | None:
        """What of it is kept in eight bits."""
        ...

    def expect(self, paths: Sequence[Path_]) -> None:
        """Says that these are going to be read."""
        ...

    def read(self, paths: Sequence[Path_]) -> dict[Path_, np.ndarray]: ...


def open_source(folder: Place, config: ModelConfig, *, dtype: Any = None) -> Source:
    """The checkpoint in `folder`, with every tensor accounted for and none read. UserError for what is wrong with it."""
    kind = OrbaxSource if is_orbax(folder) else RunSource if is_run(folder) else HubSource
    return kind(folder, config, dtype=dtype)


class Parameters:
    """The parameters of a source, read a group at a time as they are asked for; two groups at most are in memory.

    `change` is applied to every parameter that is read; then each must be finite, or UserError names the tensor. A group is `together`
    bytes at most, unless one parameter alone is larger.
    """

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        change: Callable[[Path_, np.ndarray], np.ndarray] | None = None,
        *,
        together: int = GROUP_BYTES,
    ):
        self._source, self._change, self._together = source, change, together
        self._pieces: dict[Path_, list[Piece]] = {}
        for piece in name_table(config):
            self._pieces.setdefault(piece.path, []).append(piece)
        ordered = {path: source.shapes[path] for path in self._pieces}
        self._groups = grouped(ordered, source.dtype.itemsize, together)
        self.paths = tuple(ordered)
        self._of = {path: index for index, group in enumerate(self._groups) for path in group}
        self._index, self._held, self._expected = -1, {}, 0
        self._reader, self._ahead = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._next: Future[dict[Path_, np.ndarray]] | None = None

    def get(self, path: Path_) -> np.ndarray:
        """One parameter; asked for in the order of `paths`, each group is read once, and while the one before is used (large ones after)."""
        index = self._of[path]
        if self._index != index:
            self._held = {}
            coming, self._next = self._next, None
            found = coming.result() if coming is not None and index == self._index + 1 else self._group(index)
            self._index, self._held = index, found
            if index + 1 < len(self._groups) and max(self._bytes(index), self._bytes(index + 1)) <= self._together:
                self._next = self._reader.submit(self._group, index + 1)
        return self._held[path]

    def _bytes(self, index: int) -> int:
        return self._source.dtype.itemsize * sum(math.prod(self._source.shapes[path]) for path in self._groups[index])

    def tensor_of(self, path: Path_) -> str:
        """The tensors of a parameter, by name."""
        return ", ".join(piece.name for piece in self._pieces[path])

    def groups(self) -> Iterator[dict[Path_, np.ndarray]]:
        """Each group in turn; it is the caller's alone. Before a large one comes an empty one: there is no room for another beside it."""
        for index in range(len(self._groups)):
            if self._bytes(index) > self._together:
                yield {}
            yield self._group(index)

    def _group(self, index: int) -> dict[Path_, np.ndarray]:
        for group in self._groups[self._expected : index + 2]:  # the disk works on the next one while this one is put together
            self._ahead.submit(self._source.expect, group)
        self._expected = index + 2
        found = self._source.read(self._groups[index])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(found, pool.map(self._checked, found, found.values()), strict=True))

    def _checked(self, path: Path_, array: np.ndarray) -> np.ndarray:
        if self._change is not None:
            array = self._change(path, array)
        if not finite(array):
            piece = next(piece for piece in self._pieces[path] if not finite(piece.export(array)))
            raise UserError(
                f"{piece.name} holds numbers that are not finite (NaN or infinite) as {array.dtype.name}: "
                "take a checkpoint from before training broke down, or a wider dtype"
            )
        return array


def finite(array: np.ndarray) -> bool:
    """Whether every number is neither NaN nor infinite: then its exponent is not all ones."""
    mask = EXPONENT[array.itemsize][array.dtype.name]
    flat = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    parts = (flat[start : start + COMPARED_AT_ONCE] for start in range(0, flat.size, COMPARED_AT_ONCE))
    exponents = np.empty(min(flat.size, COMPARED_AT_ONCE), flat.dtype)
    return not any(np.bitwise_and(part, flat.dtype.type(mask), out=exponents[: part.size]).max() == mask for part in parts)
