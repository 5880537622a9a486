"""Video as rounds, by one of two clocks.

Live: time is the server's. A round is what was newest at its sample times; what comes too often is thinned out, and a round that nobody
took in its second gives way to the next: frames are dropped and counted, never queued.
File: time is the video's. Nothing is dropped; who sends too fast waits.
"""

import abc
import collections
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from svlm_jax.errors import UserError
from svlm_jax.serving.child import Decoder
from svlm_jax.serving.decoder import ROUND
from svlm_jax.serving.limits import Limits
from svlm_jax.types import UInt8

READY = 2  # rounds of a file that are kept ready
EARLY = 1e-6  # seconds; times are floats


@dataclasses.dataclass(frozen=True)
class Shape:
    """What every stream of a server has in common."""

    fps: float
    chunk_seconds: float
    frames: int  # of a round
    height: int  # pixels
    width: int

    @property
    def size(self) -> dict[str, int]:
        return {"height": self.height, "width": self.width}

    def read(self, data: bytes) -> UInt8[np.ndarray, "F 3 height width"]:
        return np.frombuffer(data, np.uint8).reshape(-1, 3, self.height, self.width)


@dataclasses.dataclass(frozen=True)
class Grid:
    """When rounds are due by the server's clock: at start + n * seconds."""

    start: float
    seconds: float

    def next(self, now: float) -> float:
        """The first instant that is later."""
        return self.start + (math.floor((now - self.start) / self.seconds + EARLY) + 1) * self.seconds


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """One round of video, ready for the engine."""

    start: float  # seconds of the stream
    end: float
    frames: UInt8[np.ndarray, "F 3 height width"]
    arrived: float  # when its newest frame came, by the machine's monotonic clock


@dataclasses.dataclass
class Counts:
    """Frames of one stream since its beginning."""

    received: int = 0
    thinned: int = 0  # replaced by a newer one before their sample time, as is usual above the rate that is looked at
    dropped: int = 0  # live: those of rounds that were not taken in time
    broken: int = 0  # could not be decoded


class Source(abc.ABC):
    """Any of the below. `notify` of their constructors is called when `ready` or `ended` may have changed."""

    live: bool  # time is the server's
    paced: bool  # one round each interval of the server's clock, though nothing is dropped
    paused: bool
    counts: Counts
    info: dict[str, Any]  # what is known of the video
    failure: str  # why it ended, if not at its end
    name: str

    @abc.abstractmethod
    def ready(self) -> bool:
        """Whether there is a round."""

    @abc.abstractmethod
    def take(self) -> Round | None:
        """The next round, if there is one."""

    @property
    @abc.abstractmethod
    def ended(self) -> bool:
        """Whether no round will come any more."""

    def pause(self, paused: bool) -> None:
        """A file waits; what is live goes by."""
        self.paused = paused

    @abc.abstractmethod
    def close(self) -> None: ...


class FileSource(Source):
    """A file, or a URL of one: rounds are decoded ahead in a process of their own."""

    live = False

    def __init__(
        self, source: str, shape: Shape, limits: Limits, notify: Callable[[], None], *, paced: bool, start: float = 0.0, duration: float | None = None
    ):
        self.name, self.paced, self.paused = source, paced, False
        self.counts, self.info, self.failure = Counts(), {}, ""
        self._shape, self._limits, self._notify = shape, limits, notify
        self._ready: collections.deque[Round] = collections.deque()
        self._room = threading.Condition()
        self._done = self._closed = False
        self._heard = time.monotonic()
        job = {"fps": shape.fps, "chunk_seconds": shape.chunk_seconds, "start": start, "duration": duration, "memory": limits.decoder_bytes}
        self._decoder = Decoder(mode="rounds", source=source, **shape.size, **job)
        threading.Thread(target=self._read, name="file", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _read(self) -> None:
        try:
            for kind, payload in self._decoder.messages():
                if kind == b"I":
                    self.info = json.loads(payload)
                elif kind == b"E":
                    self.failure = payload.decode()
                elif kind == b"R":
                    _, start, end, broken = ROUND.unpack_from(payload)
                    self.counts.received += self._shape.frames
                    self.counts.broken += broken
                    round = Round(start, end, self._shape.read(payload[ROUND.size :]), time.monotonic())
                    with self._room:
                        self._room.wait_for(lambda: len(self._ready) < READY or self._closed)
                        self._ready.append(round)
                    self._notify()
                self._heard = time.monotonic()
        except UserError as error:
            self.failure = self.failure or f"{self.name}: {error}"
        finally:
            self._done = True
            self._decoder.close()
            self._notify()

    def _watch(self) -> None:
        """Ends a decoder that has sent nothing for too long, though there was room for it."""
        while not self._done:
            time.sleep(0.25)
            if len(self._ready) >= READY:
                self._heard = time.monotonic()
            elif time.monotonic() - self._heard > self._limits.stall_seconds:
                self.failure = f"{self.name}: nothing came of it for {self._limits.stall_seconds:g} s"
                self._decoder.close()
                return

    def ready(self) -> bool:
        return bool(self._ready)

    def take(self) -> Round | None:
        with self._room:
            round = self._ready.popleft() if self._ready else None
            self._room.notify_all()
        return round

    @property
    def ended(self) -> bool:
        return self._done and not self._ready

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()
        self._decoder.close()
