"""Batches of packed rows from annotation files, in one order whatever the number of hosts, processes and threads (Grain).

The order of all samples is that of Grain's shuffle and mix, which give sample i by its number. A fixed number of lanes take them
in turn: lane l has the samples l, l + lanes, l + 2 lanes, ... and packs them into rows of its own. A host serves a run of
lanes, so any number of hosts that divides the lanes makes the same rows. A lane's state is two things: the next sample's number, and
the numbers of the samples in its open rows, which are read again on resuming.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import grain.experimental
from absl import flags

from svlm_jax.config import VisionConfig
from svlm_jax.data.annotations import AnnotationFile, UnusableRow
from svlm_jax.data.batch import Batch
from svlm_jax.data.loader import LoaderConfig, Rejected, SampleLoader, Source
from svlm_jax.data.packing import Loaded, OpenRow, Packer, RowShape, check_fits, make_batch
from svlm_jax.data.parcel import Parcel, Post
from svlm_jax.errors import UserError
from svlm_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STATE_VERSION = 1
PATIENCE = 20, 1_000  # as many rows one after the other that cannot be used, if the data have so many, show that they are wrong as a whole


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One annotation file, or one ArrayRecord file made from it (`svlm data convert`)."""

    path: str
    videos: str = ""  # folder that the paths of videos are relative to
    weight: float | None = None  # share of the mixture, against the others' weights


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """All that decides which rows come in which order. Weights: given for all data sets or for none; none: each row once an epoch."""

    datasets: Mapping[str, DatasetConfig]
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    shape: RowShape = dataclasses.field(default_factory=RowShape)
    rows: int = 8  # of a batch, over all hosts
    lanes: int = 8  # divides `rows`, and is a multiple of the number of hosts
    open_rows: int = 2  # that a lane fills at a time
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None  # None: without end

    @property
    def evicts(self) -> bool:
        """Whether rows say what a stream would have evicted."""
        return self.loader.sample.window is not None

    def __post_init__(self):
        weights = {name: dataset.weight for name, dataset in self.datasets.items()}
        if not weights:
            raise UserError("no data set is given: name at least one annotation file")
        given = [weight for weight in weights.values() if weight is not None]
        if len(given) not in (0, len(weights)):
            raise UserError(f"data sets {', '.join(weights)}: give a weight to each of them or to none")
        if any(weight <= 0 for weight in given):
            raise UserError(f"weights of data sets must be positive, not {weights}: leave out what is not wanted")
        if given and self.epochs is not None:
            raise UserError("a mixture with weights has no epochs: leave out either")
        if min(self.rows, self.lanes) < 1 or self.rows % self.lanes:
            raise UserError(f"{self.rows} rows a batch cannot be shared by {self.lanes} lanes: lanes must divide rows")


@dataclasses.dataclass(frozen=True)
class Workers:
    """How the work is done. Changes no sample, row or order. A lane has its own workers; `ahead` samples wait in each of them."""

    processes: int = 0  # worker processes a lane; 0: threads of this one
    threads: int = 2  # that decode in each process
    ahead: int = 2
    batches_ahead: int = 2  # whole batches that are ready before they are asked for


class Rows(NamedTuple):
    """This host's part of a batch."""

    batch: Batch
    samples: tuple[tuple[str, ...], ...]  # of each row: data set and row of every sample in it
    skipped: dict[str, int]  # rows that this host could not use so far, by "data set: reason"


def open_source(config: DatasetConfig) -> Source:
    """The rows of a data set. Raises UserError where there are none."""
    if config.path.endswith(".array_record"):
        from svlm_jax.data.records import open_records

        return Source(open_records(config.path), config.videos)
    return Source(AnnotationFile(config.path), config.videos)


def sample_order(config: DataConfig, lengths: Mapping[str, int]) -> grain.MapDataset:
    """Sample number -> (data set, row), over all lanes and hosts."""

    def keys(name: str) -> grain.MapDataset:
        return grain.MapDataset.range(lengths[name]).map(lambda row: (name, int(row)))

    parts = {name: keys(name) for name in config.datasets}
    weights = [dataset.weight for dataset in config.datasets.values() if dataset.weight is not None]
    if weights:
        shuffled = [part.shuffle(config.seed) if config.shuffle else part for part in parts.values()]
        return grain.MapDataset.mix([part.repeat() for part in shuffled], weights)
    whole = grain.MapDataset.concatenate(list(parts.values()))
    whole = whole.shuffle(config.seed) if config.shuffle else whole
    return whole if config.epochs == 1 else whole.repeat(config.epochs)


def fingerprint(config: DataConfig, sources: Mapping[str, Source]) -> str:
    """Of all that decides which rows come: a state is of use only where it is the same."""
    told = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    told |= {"loader": dataclasses.asdict(config.loader), "shape": dataclasses.asdict(config.shape)}
    del told["loader"]["cache_bytes"]
    told["datasets"] = [(name, sources[name].signature(), dataset.weight) for name, dataset in config.datasets.items()]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


def _packed(post: Post, sample: Loaded | Rejected) -> Loaded | Rejected:
    if isinstance(sample, Rejected) or isinstance(sample.patches, Parcel):
        return sample
    return sample._replace(patches=post.pack(sample.patches))


class _Lane(grain.DatasetIterator):
    """The rows of one lane."""

    def __init__(self, samples: grain.MapDataset, config: DataConfig, workers: Workers, patience: int):
        super().__init__()
        self._samples, self._config, self._workers, self._patience = samples, config, workers, patience
        self._reader: grain.DatasetIterator | None = None
        self._post: Post | None = None
        self.set_state({"next": 0, "open": [], "skipped": {}})

    def get_state(self) -> dict[str, Any]:
        """Plain numbers, whatever is being read ahead."""
        numbers = [[item.number for item in row.items] for row in self._packer.rows]
        return {"next": self._next, "open": numbers, "skipped": dict(self.skipped)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Reads the samples of the open rows again."""
        self.close_reader()
        self._next, self._idle = state["next"], 0
        self.skipped = Counter(state["skipped"])
        self._packer = Packer(self._config.shape, self._config.open_rows)
        for numbers in state["open"]:
            row = OpenRow(self._config.shape)
            for number in numbers:
                sample = self._samples[number]
                if not isinstance(sample, Loaded) or not row.add(sample._replace(number=number)):
                    why = sample.message if isinstance(sample, Rejected) else "it no longer fits its row"
                    raise UserError(f"{sample.name} was in an open row when the state was saved, and cannot be read again: {why}")
            self._packer.rows.append(row)

    @property
    def has_processes(self) -> bool:
        return bool(self._workers.processes)

    def close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._post is not None:
            self._post.clear()
        self._reader = self._post = None

    def close(self) -> None:
        self.close_reader()
        super().close()

    def _read(self) -> Loaded | Rejected | None:
        """The next sample, None at the end."""
        if self._next >= len(self._samples):
            return None
        if self._reader is None:
            w, rest = self._workers, self._samples[self._next :]
            ahead = grain.ReadOptions(num_threads=w.threads, prefetch_buffer_size=w.ahead if w.threads else 0)
            rows = rest.to_iter_dataset(ahead)
            if w.processes:
                self._post = Post()
                rows = rows.map(functools.partial(_packed, self._post))
                rows = rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=w.processes, per_worker_buffer_size=w.ahead))
            self._reader = iter(rows)
        sample = next(self._reader)
        if isinstance(sample, Loaded):
            try:
                check_fits(sample, self._config.shape)
                sample = sample._replace(number=self._next)
            except UnusableRow as error:
                sample.discard()
                sample = Rejected(sample.name, sample.name.rpartition(":")[0], error.reason, str(error))
        self._next += 1
        return sample

    def __next__(self) -> OpenRow:
        while (sample := self._read()) is not None:
            if isinstance(sample, Rejected):
                self._skip(sample)
                continue
            self._idle = 0
            closed = self._packer.add(sample)
            if closed is not None:
                return closed
        last = self._packer.flush()
        if last is None:
            raise StopIteration
        return last

    def _skip(self, row: Rejected) -> None:
        kind = f"{row.dataset}: {row.reason}"
        if kind not in self.skipped:
            logger.warning("%s is skipped (%s); further rows of this kind are counted only", row.name, row.message)
        self.skipped[kind] += 1
        self._idle += 1
        if self._idle >= self._patience:
            raise UserError(f"{self._idle} rows in a row cannot be used, the last one {row.name}: {row.message}: check paths and settings of the data")


class _Batches(grain.DatasetIterator):
    """This host's part of every batch."""

    def __init__(self, lanes: dict[int, _Lane], config: DataConfig, vision: VisionConfig, print_: str, go_on: bool):
        super().__init__(list(lanes.values()))
        self._lanes, self._config, self._vision, self._print, self._go_on = lanes, config, vision, print_, go_on
        self._pool = ThreadPoolExecutor(len(lanes))  # lanes wait for their workers, and map the memory that these share, side by side

    def __next__(self) -> Rows:
        self._assert_not_closed()
        each = self._config.rows // self._config.lanes
        rows = [row for taken in self._pool.map(lambda lane: [next(lane, None) for _ in range(each)], self._lanes.values()) for row in taken]
        if not any(rows) and not self._go_on:
            raise StopIteration
        filled = [row or OpenRow(self._config.shape) for row in rows]  # at the end of the last epoch lanes run dry one by one
        samples = tuple(tuple(item.name for item in row.items) for row in filled)
        skipped = sum((lane.skipped for lane in self._lanes.values()), Counter())
        batch = make_batch(filled, self._config.shape, self._vision, evicts=self._config.evicts)
        return Rows(batch, samples, dict(skipped))

    def close(self) -> None:
        """Ends all worker processes at once: one after the other they take two seconds each."""
        if not self._closed:
            self._pool.shutdown(wait=False)
            # Not in the pool: where this is called for garbage, its threads may have ended already
            closing = [threading.Thread(target=lane.close) for lane in self._lanes.values() if lane.has_processes]
            for thread in closing:
                thread.start()
            for thread in closing:
                thread.join()
        super().close()

    def get_state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "fingerprint": self._print,
            "lanes": {str(number): lane.get_state() for number, lane in self._lanes.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for the state of other data or settings, or where lanes of this host are missing (`merge_states`)."""
        if (state.get("version"), state.get("fingerprint")) != (STATE_VERSION, self._print):
            raise UserError("the state of the data belongs to other data or settings, so the order would change: resume with those it was saved with")
        missing = [str(number) for number in self._lanes if str(number) not in state["lanes"]]
        if missing:
            raise UserError(f"the state of the data lacks lanes {', '.join(missing)}: join the states of all hosts (merge_states) before resuming")
        for number, lane in self._lanes.items():
            lane.set_state(state["lanes"][str(number)])


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The states of all hosts after the same batch as one, which any number of hosts can resume from."""
    first, *others = states
    lanes = dict(first["lanes"])
    for other in others:
        if (other["version"], other["fingerprint"]) != (first["version"], first["fingerprint"]):
            raise UserError("states of the data of different runs cannot be joined")
        lanes |= other["lanes"]
    return {**first, "lanes": lanes}


class PackedBatches(grain.IterDataset):
    """`Rows` after `Rows`, as a Grain data set: its iterator has `get_state` and `set_state`, and closes its workers with `close`."""

    def __init__(
        self,
        samples: grain.MapDataset,
        config: DataConfig,
        vision: VisionConfig,
        sources: Mapping[str, Source],
        shard: tuple[int, int],
        workers: Workers,
        go_on: bool,
    ):
        super().__init__(samples)
        index, count = shard
        if not 0 <= index < count or config.lanes % count:
            raise UserError(f"{config.lanes} lanes cannot be shared by {count} hosts: set lanes to a multiple of the number of hosts")
        self._samples, self._config, self._vision, self._workers, self._go_on = samples, config, vision, workers, go_on
        self._print = fingerprint(config, sources)
        self._patience = min(max(PATIENCE[0], sum(len(source.rows) for source in sources.values())), PATIENCE[1])
        each = config.lanes // count
        self._numbers = range(index * each, (index + 1) * each)

    def __iter__(self) -> _Batches:
        lanes = {n: _Lane(self._samples[n :: self._config.lanes], self._config, self._workers, self._patience) for n in self._numbers}
        return _Batches(lanes, self._config, self._vision, self._print, self._go_on)


def make_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    vision: VisionConfig,
    *,
    shard: tuple[int, int] = (0, 1),
    workers: Workers | None = None,
    go_on: bool = False,
    at_most: int | None = None,
) -> grain.IterDataset:
    """Batches of `rows` rows. Elements are `Rows`; `iter` gives an iterator that can be saved and resumed.

    Args:
      shard: (this host, hosts): it gets a run of `rows` / hosts rows of each batch, in order.
      go_on: batches of padding without end behind the last epoch. Hosts run dry one by one, and all must take part in every step: let
        each go on until none of them has a sample.
      at_most: samples of an epoch, evenly spread over it; the others are left out.

    Raises:
      UserError: where a data set cannot be opened, or where the lanes cannot be shared by the hosts.
    """
    workers = workers or Workers()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its settings from flags, which a program without absl's main never parses
    grain.config.update("py_traceback_filtering", "off")  # it adds notes to exceptions
    sources = {name: open_source(dataset) for name, dataset in config.datasets.items()}
    lengths = {name: len(source.rows) for name, source in sources.items()}
    order = sample_order(config, lengths)
    if at_most is not None and len(order) > at_most:
        order = order[:: -(-len(order) // at_most)]
    samples = order.map(SampleLoader(sources, config.loader, tokenizer, vision))
    batches = PackedBatches(samples, config, vision, sources, shard, workers, go_on)
    if not workers.batches_ahead:
        return batches
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=workers.batches_ahead)
