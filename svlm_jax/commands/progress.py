"""How far long work is: how much is done, how fast, and the time to go, on one line that is drawn again, or a line now and then in a log."""

import sys
import time
from collections.abc import Callable
from typing import Any

REDRAWN = 0.2  # seconds between lines on a terminal
LOGGED = 10.0  # seconds between lines elsewhere


class ProgressLine:
    """Call it with (bytes done, bytes in total); a context manager, so that the line ends where the work does. `out` is a text file."""

    def __init__(self, words: str, *, out: Any = None, now: Callable[[], float] = time.monotonic):
        self._words, self._out, self._now = words, out or sys.stderr, now
        self._live = self._out.isatty()
        self._began = now()
        self._told = self._began if not self._live else -REDRAWN
        self._drawn = False

    def __call__(self, done: float, total: float) -> None:
        moment = self._now()
        if done < total and moment - self._told < (REDRAWN if self._live else LOGGED):
            return
        self._told = moment
        line = f"{self._words} {self._status(done, total, moment - self._began)}"
        self._out.write(f"\r\x1b[K{line}" if self._live else f"{line}\n")
        self._out.flush()
        self._drawn = True

    def _status(self, done: float, total: float, seconds: float) -> str:
        return status(int(done), int(total), seconds)

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and self._drawn:
            self._out.write("\n")
            self._out.flush()


class Countdown(ProgressLine):
    """Call it with (seconds of a video that are done, seconds in total)."""

    def _status(self, done: float, total: float, seconds: float) -> str:
        speed = done / seconds if seconds > 0 else 0.0
        left = f", {_clock((total - done) / speed)} to go" if speed else ""
        return f"{_clock(done)} of {_clock(total)}, {speed:.0f} times as fast as it plays{left}"


def status(done: int, total: int, seconds: float) -> str:
    """`4.2 of 16.6 GB, 310 MB/s, 00:40 to go`."""
    speed = done / seconds if seconds > 0 else 0.0
    unit, name = next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB")) if total >= size), (1e3, "kB"))
    text = f"{done / unit:.1f} of {total / unit:.1f} {name}, {speed / 1e6:.0f} MB/s"
    if done >= total:
        return f"{text}, done in {_clock(seconds)}"
    return f"{text}, {_clock((total - done) / speed)} to go" if speed else text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
