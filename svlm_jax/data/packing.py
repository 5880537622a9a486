"""Several samples in one row, told apart by segment ids, at one fixed shape (`data.batch`).

Packing is online and first-fit: a sample goes into the first of a few open rows that has room for its tokens and its grids;
where none has, the oldest row is closed. Nothing is cut in two and nothing is reordered within a row. A sample with a window begins at a block
of queries (`data.eviction`), so that each block has the previous text of one sample alone.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from svlm_jax.config import VisionConfig
from svlm_jax.data import eviction
from svlm_jax.data.annotations import UnusableRow
from svlm_jax.data.batch import IGNORED, PADDING, Batch
from svlm_jax.data.eviction import NEVER, Eviction
from svlm_jax.data.parcel import Parcel
from svlm_jax.data.patches import grid_order, window_tokens
from svlm_jax.data.samples import Sample
from svlm_jax.errors import UserError

COPIERS = 16  # threads that fill the rows of a batch


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The shape of every row of a batch. A grid of height x width pixels takes ceil(height / 112) * ceil(width / 112) windows.

    Where the vision tower has no windows, it takes one for every 16 of its tokens (`data.patches`).
    """

    tokens: int = 20_480  # T
    bins: int = 28  # G; full attention of the vision tower is over one bin at a time
    windows: int = 45  # W of a bin: 45 are one grid of 720p video (560 x 1008 pixels)
    samples: int = 16  # at most: kernels of attention are compiled for a number of segments
    memory: int = 2048  # places of a sample's previous text, where it has a window
    reach: int = 16_384  # tokens that a window goes back at most, where samples have one

    def __post_init__(self):
        if min(self.tokens, self.bins, self.windows, self.samples, self.memory, self.reach) < 1:
            row = f"a row of {self.tokens} tokens, {self.samples} samples and {self.bins} bins of {self.windows} windows"
            raise UserError(f"{row}, memory of {self.memory} and reach of {self.reach}: all must be at least 1")


class Loaded(NamedTuple):
    """A sample with its pixels, ready to be packed."""

    name: str  # data set and row, as messages call it
    sample: Sample
    patches: np.ndarray | Parcel  # uint8 [grids, w, p, features], all turns' clips one after the other
    frame_hw: tuple[int, int]  # pixels
    number: int = 0  # in the order of its lane (`data.pipeline`)

    @property
    def windows(self) -> int:
        """Of one grid."""
        return self.patches.shape[1]

    def unpack(self, parts: Sequence[np.ndarray]) -> None:
        """Puts each grid's patches into one of `parts`, once."""
        if isinstance(self.patches, Parcel):
            self.patches.read(parts)
            self.patches.drop()
            return
        for part, grid in zip(parts, self.patches, strict=True):
            part[...] = grid

    def discard(self) -> None:
        """Of a sample that will not be unpacked."""
        if isinstance(self.patches, Parcel):
            self.patches.drop()


@dataclasses.dataclass
class OpenRow:
    """A row that is being filled. `free` is what each bin has left, in windows."""

    shape: RowShape
    items: list[Loaded] = dataclasses.field(default_factory=list)
    begins: list[int] = dataclasses.field(default_factory=list)  # of each item: its first token's place
    tokens: int = 0  # up to the last item's end
    free: list[int] = dataclasses.field(default_factory=list)
    bins: list[list[int]] = dataclasses.field(default_factory=list)  # of each item: the bin of each of its grids

    def __post_init__(self):
        self.free = self.free or [self.shape.windows] * self.shape.bins

    def add(self, item: Loaded) -> bool:
        """Whether the sample fits; it is in the row then."""
        begin = self.tokens if item.sample.eviction is None else -(-self.tokens // eviction.BLOCK) * eviction.BLOCK
        if len(self.items) == self.shape.samples or begin + len(item.sample.tokens) > self.shape.tokens:
            return False
        free, bins, at = list(self.free), [], 0
        for _ in range(len(item.patches)):
            while at < len(free) and free[at] < item.windows:
                at += 1
            if at == len(free):
                return False
            free[at] -= item.windows
            bins.append(at)
        self.free, self.tokens = free, begin + len(item.sample.tokens)
        self.items.append(item)
        self.begins.append(begin)
        self.bins.append(bins)
        return True


def check_fits(item: Loaded, shape: RowShape) -> None:
    """Raises UnusableRow where a sample has no room even in an empty row."""
    length = len(item.sample.tokens)
    if length > shape.tokens:
        raise UnusableRow("longer than a row", f"{length} tokens, and a row has {shape.tokens}")
    if (facts := item.sample.eviction) is not None:
        if len(facts.source) > shape.memory:
            raise UnusableRow("too much previous text", f"{len(facts.source)} places of previous text, and a sample has {shape.memory}")
        if (reach := int((np.arange(length) - facts.start).max())) > shape.reach:
            raise UnusableRow("a window too long", f"a window of {reach} tokens, and attention reaches back {shape.reach}")
    if item.windows > shape.windows:
        raise UnusableRow("frames larger than a bin", f"{item.windows} windows a grid, and a bin has {shape.windows}")
    if len(item.patches) > shape.bins * (shape.windows // item.windows):
        grids = shape.bins * (shape.windows // item.windows)
        raise UnusableRow("more video than a row", f"{len(item.patches)} grids of {item.windows} windows, and a row has room for {grids}")


class Packer:
    """First-fit over at most `open_rows` open rows. Holds nothing but these rows."""

    def __init__(self, shape: RowShape, open_rows: int = 2):
        if open_rows < 1:
            raise UserError(f"open_rows must be at least 1, not {open_rows}")
        self.shape, self.limit = shape, open_rows
        self.rows: list[OpenRow] = []

    def add(self, item: Loaded) -> OpenRow | None:
        """Takes a sample; gives the row that had to be closed for it, if any. Raises UnusableRow as `check_fits` does."""
        check_fits(item, self.shape)
        if any(row.add(item) for row in self.rows):
            return None
        closed = self.rows.pop(0) if len(self.rows) == self.limit else None
        self.rows.append(OpenRow(self.shape))
        assert self.rows[-1].add(item)
        return closed

    def flush(self) -> OpenRow | None:
        """The oldest open row, or None where there is none left."""
        return self.rows.pop(0) if self.rows else None


def make_batch(rows: Sequence[OpenRow], shape: RowShape, vision: VisionConfig, *, evicts: bool = False) -> Batch:
    """The arrays of some rows, which may be empty; padding is PADDING, IGNORED and zeros. `evicts`: their samples have a window."""
    b, t, g, w = len(rows), shape.tokens, shape.bins, shape.windows
    merged = window_tokens(vision)
    p = merged * vision.spatial_merge_size**2
    tokens, labels = np.zeros((b, t), np.int32), np.full((b, t), IGNORED, np.int32)
    positions, segments = np.zeros((b, t, 3), np.int32), np.full((b, t), PADDING, np.int32)
    patches = np.empty((b, g, w, p, vision.patch_features), np.uint8)  # by far the largest: what stays free is cleared below
    coordinates, valid = np.zeros((b, g, w, p, 2), np.int32), np.zeros((b, g, w, p), np.bool_)
    grids, places = np.full((b, g, w), PADDING, np.int32), np.full((b, g, w, merged), t, np.int32)

    def fill(index: int) -> None:
        row = rows[index]
        used, count = [0] * g, [0] * g
        for segment, (item, begin, bins) in enumerate(zip(row.items, row.begins, row.bins, strict=True), start=1):
            sample, order = item.sample, grid_order(vision, *item.frame_hw)
            part = slice(begin, begin + len(sample.tokens))
            tokens[index, part], labels[index, part] = sample.tokens, sample.labels
            positions[index, part], segments[index, part] = sample.positions, segment
            pads = sample.places.reshape(len(item.patches), -1) + begin
            firsts = []
            for target in bins:
                firsts.append(used[target])
                used[target] += item.windows
                count[target] += 1
                grids[index, target, firsts[-1] : used[target]] = count[target]
            targets, windows = np.asarray(bins)[:, None], np.asarray(firsts)[:, None] + np.arange(item.windows)
            coordinates[index, targets, windows], valid[index, targets, windows] = order.coordinates, order.valid
            places[index, targets, windows] = np.where(order.tokens >= 0, pads[:, order.tokens], t)
            item.unpack([patches[index, target, first : first + item.windows] for target, first in zip(bins, firsts, strict=True)])
        for target, end in enumerate(used):
            patches[index, target, end:] = 0

    with ThreadPoolExecutor(COPIERS) as pool:  # patches are hundreds of megabytes a batch, and copying lets other threads run
        list(pool.map(fill, range(b)))
    eviction = make_eviction(rows, shape) if evicts else None
    arrays: Any = (tokens, labels, positions, segments, patches, coordinates, valid, grids, places)  # on the host as yet
    return Batch(*arrays, eviction=eviction)


def make_eviction(rows: Sequence[OpenRow], shape: RowShape) -> Eviction:
    """The facts of some rows. Padding sees itself alone, and what stands nowhere is seen by no token."""
    b, t, m = len(rows), shape.tokens, shape.memory * shape.samples
    start = np.tile(np.arange(t, dtype=np.int32), (b, 1))
    round, shift = np.full((b, t), NEVER, np.int32), np.zeros((b, t), np.int32)
    source, coordinate, first, stop = (np.zeros((b, m), np.int32) for _ in range(4))
    for index, row in enumerate(rows):
        rounds = 0
        for number, (item, begin) in enumerate(zip(row.items, row.begins, strict=True)):
            facts, place = item.sample.eviction, number * shape.memory
            assert facts is not None
            part, places = slice(begin, begin + len(facts.start)), slice(place, place + len(facts.source))
            start[index, part], round[index, part], shift[index, part] = facts.start + begin, facts.round + rounds, facts.shift
            source[index, places], coordinate[index, places] = facts.source + begin, facts.coordinate
            first[index, places], stop[index, places] = facts.first + rounds, facts.stop + rounds
            rounds += len(item.sample.grids)
    arrays: Any = (start, round, shift, source, coordinate, first, stop)
    return Eviction(*arrays)
