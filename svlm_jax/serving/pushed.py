"""Frames that are sent in, one by one, and live sources, which send themselves: behind a URL, or at the other end of WebRTC."""

import collections
import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from svlm_jax.errors import UserError
from svlm_jax.serving.child import Decoder
from svlm_jax.serving.decoder import STAMP
from svlm_jax.serving.limits import Limits, Rate, TooFast
from svlm_jax.serving.sources import EARLY, READY, Counts, Grid, Round, Shape, Source

PENDING = 64  # pushed frames that wait, by the file's clock, before the sender has to
LEAP = 10.0  # seconds without a frame, by the file's clock, of which no rounds are made
PARTING = 4.0  # seconds for a process that holds a connection to close it
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before a live source is opened again; the last one for ever


@dataclasses.dataclass(frozen=True, eq=False)
class _Frame:
    seconds: float  # since the first frame, by the sender's clock
    data: bytes | np.ndarray  # an encoded picture, or pixels
    arrived: float


class PushedSource(Source):
    """Frames that are sent in, by either clock. Pictures are decoded in a process of their own, and only those that are looked at."""

    paced = False

    def __init__(
        self,
        shape: Shape,
        limits: Limits,
        notify: Callable[[], None],
        *,
        live: bool,
        grid: Grid,
        start: float = 0.0,
        name: str = "push",
        idle_seconds: float | None = None,
    ):
        self.name, self.live, self.paused = name, live, False
        self.counts, self.info, self.failure = Counts(), {}, ""
        self._shape, self._limits, self._notify, self._grid = shape, limits, notify, grid
        self._start = start  # seconds of the stream at its first round
        self._idle = limits.idle_seconds if idle_seconds is None else idle_seconds
        self._rate = Rate(limits.frames_per_second)
        self._changed = threading.Condition()
        self._pending: collections.deque[_Frame] = collections.deque()
        self._ready: collections.deque[tuple[Round, int]] = collections.deque()  # and the frames that are in it
        self._origin: float | None = None  # the live clock: when the stream's first sample is due, once its first frame has been decoded
        self._first: float | None = None  # the file's clock: the first frame's own time
        self._last = -math.inf
        self._at = 0.0  # the file's clock: the sample time that comes next
        self._flushing = self._finished = self._done = self._closed = False
        self._heard = time.monotonic()
        self._decoder: Decoder | None = None
        threading.Thread(target=self._work, name="frames", daemon=True).start()

    # The sender's side

    def has_room(self) -> bool:
        """Whether a frame would be taken now; by the live clock always."""
        return self.live or len(self._pending) < PENDING or self._closed or self._done

    def push(self, data: bytes | np.ndarray, seconds: float | None = None) -> None:
        """One frame, and its time by the sender's clock in seconds (by the file's clock, the next that is looked at, if not given).

        Raises UserError for a time that is not after the last one's, a stream that has ended, or (TooFast) too many frames.
        """
        if isinstance(data, bytes) and not self._rate.take():
            raise TooFast(f"more than {self._limits.frames_per_second:g} frames a second: send fewer")
        with self._changed:
            if self._closed or self._done or self._finished:
                raise UserError("the stream has ended: start a new one")
            now = self._heard = time.monotonic()
            if seconds is None:
                seconds = now if self.live else (0.0 if self._first is None else max(self._last + 1 / self._shape.fps, self._first + self._at))
            if not math.isfinite(seconds):
                raise UserError("a frame's time must be a number of seconds")
            if seconds <= self._last:
                raise UserError(f"a frame of {seconds:.3f} s comes after one of {self._last:.3f} s: times must grow")
            self._last = seconds
            self._first = seconds if self._first is None else self._first
            if self.paused and self.live:
                return
            self.counts.received += 1
            if self.live and self._pending:
                self._pending.pop()
                self.counts.thinned += 1
            self._pending.append(_Frame(seconds - self._first, data, now))
            self._changed.notify_all()

    def flush(self) -> None:
        """By the file's clock: makes a round of what has been sent, whether or not its interval is full."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()

    def finish(self) -> None:
        """No more frames will come."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    # The scheduler's side

    def ready(self) -> bool:
        return bool(self._ready)

    def take(self) -> Round | None:
        with self._changed:
            round = self._ready.popleft()[0] if self._ready else None
            self._changed.notify_all()
        return round

    @property
    def ended(self) -> bool:
        return self._done and not self._ready

    def pause(self, paused: bool) -> None:
        with self._changed:
            self.paused = paused
            if self.live:
                self._drop()

    def _drop(self) -> None:
        """Live rounds that nobody took."""
        self.counts.dropped += sum(count for _, count in self._ready)
        self._ready.clear()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._decoder is not None:
            self._decoder.close()

    # The thread between them

    def _work(self) -> None:
        sample, current, pixels = 0, None, None  # the sample that comes next, the frame on the screen, and its pixels
        batch: list[np.ndarray] = []
        fresh, arrived = 0, 0.0
        try:
            while True:
                chosen = self._next(sample, current, bool(batch))
                if chosen is None:
                    return
                if chosen[0] > sample:  # time has gone on without frames, or faster than they were decoded
                    sample, batch, fresh = chosen[0], [], 0
                frame = chosen[1]
                if frame is not current and frame is not None:
                    decoded = self._decode(frame)
                    if decoded is not None:
                        pixels, fresh, arrived = decoded, fresh + 1, frame.arrived
                    current = frame
                if self.live and self._origin is None:  # a decoder's process has begun: the time that takes is not the stream's
                    with self._changed:
                        self._origin = self._grid.next(time.monotonic()) - (self._shape.frames - 1) / self._shape.fps
                    continue
                if pixels is not None:
                    batch.append(pixels)
                sample += 1
                if sample % self._shape.frames == 0:
                    if pixels is not None and (fresh or not self.live):
                        batch = [batch[0]] * (self._shape.frames - len(batch)) + batch
                        self._give(sample // self._shape.frames - 1, np.stack(batch), arrived, fresh)
                    batch, fresh = [], 0
        except UserError as error:
            self.failure = str(error)
        finally:
            self._done = True
            if self._decoder is not None:
                self._decoder.close()
            self._notify()

    def _next(self, sample: int, current: _Frame | None, begun: bool) -> tuple[int, _Frame | None] | None:
        """What is on the screen at a sample time, once that is known; None at the end."""
        with self._changed:
            self._at = sample / self._shape.fps
            while True:
                now = time.monotonic()
                if self._closed:
                    return None
                if self._first is not None or self._finished:
                    known = self._live_choice(sample, now) if self.live else self._file_choice(sample, begun)
                    if known is not None:
                        index, frame, over = known
                        return None if over else (index, frame or current)
                idle = self._heard + self._idle - now
                if idle <= 0 and not self.paused:
                    raise UserError(f"no frame came for {self._idle:g} s")
                due = self._due(sample) - now if self.live and self._origin is not None else idle
                self._changed.wait(max(0.001, min(due, idle if idle > 0 else 1.0, 1.0)))

    def _due(self, sample: int) -> float:
        return (self._origin or 0.0) + sample / self._shape.fps

    def _live_choice(self, sample: int, now: float) -> tuple[int, _Frame | None, bool] | None:
        if self._finished and not self._pending:
            return sample, None, True
        if self._origin is None:
            return (sample, self._pending[-1], False) if self._pending else None
        if now < self._due(sample):
            return None
        behind = math.floor((now - self._due(0)) / self._shape.chunk_seconds) * self._shape.frames
        sample = max(sample, behind)  # a decoder that took longer than a round
        return sample, self._pending.pop() if self._pending else None, False

    def _file_choice(self, sample: int, begun: bool) -> tuple[int, _Frame | None, bool] | None:
        if not begun and self._pending and self._pending[0].seconds - sample / self._shape.fps > LEAP:
            sample = math.floor(self._pending[0].seconds / self._shape.chunk_seconds) * self._shape.frames
        at, last = sample / self._shape.fps, self._last - (self._first or 0.0)
        if last <= at + EARLY and not (self._finished or (self._flushing and (self._pending or begun))):
            return None
        if self._finished and not begun and at >= last + 1 / self._shape.fps - EARLY:  # how long the last frame is shown
            return sample, None, True
        frame = None
        while self._pending and (self._pending[0].seconds <= at + EARLY or (sample == 0 and frame is None)):
            self.counts.thinned += frame is not None
            frame = self._pending.popleft()
        if self._flushing and not self._pending and (sample + 1) % self._shape.frames == 0:
            self._flushing = False
        self._changed.notify_all()
        return sample, frame, False

    def _decode(self, frame: _Frame) -> np.ndarray | None:
        if isinstance(frame.data, np.ndarray):
            return frame.data
        if self._decoder is None or not self._decoder.alive:
            job = {"max_pixels": self._limits.frame_pixels, "memory": self._limits.decoder_bytes}
            self._decoder = Decoder(mode="pictures", **self._shape.size, **job)
        try:
            data = self._decoder.picture(frame.data, self._limits.decode_seconds)
            return self._shape.read(data[STAMP.size :])[0]
        except UserError as error:
            self.counts.broken += 1
            self.info = {**self.info, "last_error": str(error)}
            return None

    def _give(self, index: int, frames: np.ndarray, arrived: float, fresh: int) -> None:
        begin = self._start + index * self._shape.chunk_seconds
        with self._changed:
            if self.live:
                self._drop()
                if self.paused:
                    return
            else:
                self._changed.wait_for(lambda: len(self._ready) < READY or self._closed)
            self._ready.append((Round(begin, begin + self._shape.chunk_seconds, frames, arrived), fresh))
        self._notify()


class LiveSource(PushedSource):
    """A camera or broadcast behind a URL: opened again, after longer and longer waits, when nothing comes of it."""

    def __init__(
        self,
        source: str,
        shape: Shape,
        limits: Limits,
        notify: Callable[[], None],
        tell: Callable[..., Any],
        *,
        grid: Grid,
        start: float = 0.0,
    ):
        """`tell` is called with "state" and what is known where the source has to be opened again."""
        super().__init__(shape, limits, notify, live=True, grid=grid, start=start, name=source, idle_seconds=math.inf)
        self._tell = tell
        self._stream: Decoder | None = None
        threading.Thread(target=self._keep_open, name="live", daemon=True).start()

    def _keep_open(self) -> None:
        attempts, shape = 0, self._shape
        while not self._closed:
            self._stream = Decoder(mode="live", source=self.name, fps=shape.fps, memory=self._limits.decoder_bytes, **shape.size)
            watch = self._watchdog(self._stream)
            why = "it ended"
            try:
                for kind, payload in self._stream.messages():
                    if kind == b"I":
                        self.info = json.loads(payload)
                    elif kind == b"E":
                        why = payload.decode()
                    elif kind == b"F":
                        attempts = 0
                        watch.cancel()
                        watch = self._watchdog(self._stream)
                        with contextlib.suppress(UserError):
                            self.push(shape.read(payload[STAMP.size :])[0])
            except UserError as error:
                why = str(error)
            watch.cancel()
            self._stream.close()
            if self._closed:
                return
            wait = BACK_OFF[min(attempts, len(BACK_OFF) - 1)]
            attempts += 1
            self._tell("state", state="reconnecting", message=why, seconds=wait)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, wait)

    def _watchdog(self, stream: Decoder) -> threading.Timer:
        """Ends the decoder, so that it is opened again, unless it is called off."""
        timer = threading.Timer(self._limits.stall_seconds, stream.close)
        timer.daemon = True
        timer.start()
        return timer

    def close(self) -> None:
        super().close()
        if self._stream is not None:
            self._stream.close()


class PeerSource(PushedSource):
    """A camera that sends over WebRTC, to a process of its own. It ends with the connection, and is not made again from here."""

    def __init__(self, offer: bytes, shape: Shape, limits: Limits, notify: Callable[[], None], *, grid: Grid, start: float = 0.0):
        super().__init__(shape, limits, notify, live=True, grid=grid, start=start, name="webrtc")
        self._answer: Future[str] = Future()
        self._peer = Decoder(mode="peer", fps=shape.fps, max_pixels=limits.frame_pixels, memory=limits.decoder_bytes, **shape.size)
        threading.Thread(target=self._receive, args=(offer,), name="peer", daemon=True).start()

    def answer(self, seconds: float) -> str:
        """The SDP for the other end. Blocks. UserError where the offer cannot be answered, TimeoutError where it is not in that time."""
        return self._answer.result(seconds)

    def _receive(self, offer: bytes) -> None:
        why = "the connection ended before it began"
        try:
            self._peer.send(offer)
            for kind, payload in self._peer.messages():
                if kind == b"I":
                    self._answer.set_result(json.loads(payload)["answer"])
                elif kind == b"E":
                    why = self.failure = payload.decode()
                elif kind == b"F":
                    with contextlib.suppress(UserError):
                        self.push(self._shape.read(payload[STAMP.size :])[0])
        except (UserError, OSError, ValueError) as error:
            why = self.failure = "" if self._closed else str(error)
        finally:
            if not self._answer.done():
                self._answer.set_exception(UserError(why))
            self._peer.close()
            self.finish()

    def close(self) -> None:
        super().close()
        self._peer.leave(PARTING)
