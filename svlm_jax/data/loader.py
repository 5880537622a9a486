"""From a row of an annotation file to a sample with its pixels: what a worker does."""

import collections
import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from av.error import FFmpegError

from svlm_jax import storage
from svlm_jax.config import VisionConfig
from svlm_jax.data.annotations import Annotation, AnnotationFile, UnusableRow, parse_annotation
from svlm_jax.data.packing import Loaded
from svlm_jax.data.patches import grid_order, window_patches
from svlm_jax.data.resize import FACTOR, MAX_PIXELS
from svlm_jax.data.samples import SampleConfig, lay_out, make_script
from svlm_jax.data.video import TruncatedVideo, read_rounds
from svlm_jax.errors import UserError
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import UInt8

MAX_SECONDS = 64.0  # the published clips last at most this long, and those beyond it are mistakes


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What is done with a row."""

    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    max_pixels: int = MAX_PIXELS  # of a frame
    max_seconds: float = MAX_SECONDS  # longer clips are not used: cut them into chunks
    cache_bytes: int = 256 << 20  # decoded frames that each process keeps, for the clips that overlap or come again

    def __post_init__(self):
        if self.max_seconds <= 0 or self.cache_bytes < 0:
            raise UserError(f"max_seconds must be positive and cache_bytes not negative, not {self.max_seconds} and {self.cache_bytes}")


class Rejected(NamedTuple):
    """A row that was not used."""

    name: str  # data set and row
    dataset: str
    reason: str  # its kind, short
    message: str


class FrameCache:
    """The frames of single turns, the least recently used of them forgotten. Shared by threads; a copy in another process is empty."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._items: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return FrameCache, (self.limit,)

    def get(self, key: tuple) -> np.ndarray | None:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: tuple, frames: np.ndarray) -> None:
        with self._lock:
            if frames.nbytes > self.limit or key in self._items:
                return
            self._items[key] = frames
            self.size += frames.nbytes
            while self.size > self.limit:
                self.size -= self._items.popitem(last=False)[1].nbytes


def read_clip(
    path: str, annotation: Annotation, config: LoaderConfig, cache: FrameCache, *, factor: int = FACTOR
) -> list[UInt8[np.ndarray, "F h w 3"]]:
    """The frames of each of a clip's turns, all of `frames_per_turn`, their sides multiples of `factor`.

    Raises UnusableRow where the video cannot give them.
    """
    c, turns = config.sample, make_script(annotation, config.sample).turns
    keys = [(path, config.max_pixels, c.fps, round(turn.start * 1000)) for turn in turns]
    clips = [cache.get(key) for key in keys]
    missing = [index for index, frames in enumerate(clips) if frames is None]
    if not missing:
        return [frames for frames in clips if frames is not None]
    if "://" not in path:
        if not os.path.isfile(path):
            raise UnusableRow("video missing", path)
        if not os.path.getsize(path):
            raise UnusableRow("video empty", path)
    first, count = missing[0], missing[-1] + 1 - missing[0]
    shown = first
    try:
        rounds = read_rounds(
            path,
            fps=c.fps,
            chunk_seconds=c.turn_seconds,
            max_pixels=config.max_pixels,
            start=turns[first].start,
            duration=count * c.turn_seconds,
            factor=factor,
            threads=1,  # clips are read side by side, and more threads would decode pictures ahead that no clip shows
        )
        for shown, turn in enumerate(rounds, first):
            clips[shown] = turn.frames
            cache.put(keys[shown], turn.frames)
            if shown == missing[-1]:
                break
    except TruncatedVideo as error:
        raise UnusableRow("video ends early", str(error)) from None
    except (UserError, FFmpegError) as error:
        raise UnusableRow("video unreadable", str(error)) from None
    whole = [frames for frames in clips if frames is not None]
    if len(whole) < len(turns):
        raise UnusableRow("video ends early", f"{path} is over before {turns[shown + 1].start:g} s, and the clip lasts to {annotation.end:g} s")
    return whole


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set: its rows, and the folder that their videos' paths are relative to."""

    rows: AnnotationFile | Sequence[bytes]  # an ArrayRecord is a plain sequence of rows
    videos: str = ""

    def annotation(self, row: int) -> Annotation:
        """Raises UnusableRow as `parse_annotation` does."""
        return self.rows.annotation(row) if isinstance(self.rows, AnnotationFile) else parse_annotation(self.rows[row])

    def signature(self) -> str:
        """Other where the rows are others; of an ArrayRecord only their number can be told without reading it all."""
        return self.rows.index.content if isinstance(self.rows, AnnotationFile) else str(len(self.rows))

    def path(self, video: str) -> str:
        """Where a row's video is."""
        return video if "://" in video else storage.join(self.videos, video)


class SampleLoader:
    """(data set, row) -> Loaded, or Rejected where the row cannot be used. Whatever else goes wrong is raised."""

    def __init__(self, sources: Mapping[str, Source], config: LoaderConfig, tokenizer: Tokenizer, vision: VisionConfig):
        self.sources, self.config, self.tokenizer, self.vision = dict(sources), config, tokenizer, vision
        self.layout = PromptLayout.from_tokenizer(tokenizer)
        self.cache = FrameCache(config.cache_bytes)

    def __call__(self, key: tuple[str, int]) -> Loaded | Rejected:
        dataset, row = key
        name = f"{dataset}:{row}"
        try:
            return self.load(name, dataset, row)
        except UnusableRow as error:
            return Rejected(name, dataset, error.reason, str(error))

    def load(self, name: str, dataset: str, row: int) -> Loaded:
        """Raises UnusableRow."""
        source, config = self.sources[dataset], self.config
        annotation = source.annotation(int(row))
        seconds = annotation.end - annotation.start
        if seconds > config.max_seconds + 1e-6:
            raise UnusableRow("clip too long", f"{seconds:g} s, and max_seconds is {config.max_seconds:g}")
        clips = read_clip(source.path(annotation.video), annotation, config, self.cache, factor=self.vision.merged_patch_size)
        height, width = clips[0].shape[1:3]
        sample = lay_out(annotation, config.sample, (height, width), self.tokenizer, self.layout, self.vision)
        if not np.any(sample.labels >= 0):
            raise UnusableRow("nothing to learn", "no token has a label")
        depth = self.vision.temporal_patch_size
        order = grid_order(self.vision, height, width)
        patches = np.empty((sum(grid[0] for grid in sample.grids), *order.valid.shape, self.vision.patch_features), np.uint8)
        begin = 0
        for frames, (count, _, _) in zip(clips, sample.grids, strict=True):
            window_patches(frames[: count * depth], self.vision, out=patches[begin : begin + count])
            begin += count
        return Loaded(name, sample, patches, (height, width))
