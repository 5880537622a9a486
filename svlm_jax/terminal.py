"""What a person watches while a video is captioned: the words as they are said and, on a terminal, one status line below them."""

import contextlib
import os
import re
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TextIO

from svlm_jax.captions import Caption, clean, clock
from svlm_jax.errors import UserError

_STATUS_EVERY = 5.0  # seconds between status lines where they can't be redrawn in place
_BUSY_EVERY = 1.0  # seconds between the lines of a long wait there: nobody waits two without a word
_LONG = 2.0  # seconds of a wait that is told of when it is over
_SPIN_EVERY = 0.5  # seconds between redraws of a long wait on a terminal
_SPINNER = "|/-\\"  # ASCII, as the bar: pretty blocks are two columns wide on East Asian terminals
_BAR = range(10, 41)  # columns between the brackets
_CLEAR = "\r\x1b[K"  # to the start of the line, and erase it
_JOINERS = "\u200c\u200d"  # the invisible characters that spelling and emoji need


def printable(text: str) -> str:
    """One line that can't steer a terminal: no controls, no escape sequences, no invisible marks such as a change of direction."""
    return "".join(c for c in clean(text) if c in _JOINERS or unicodedata.category(c) != "Cf")


def cells(text: str) -> int:
    """Terminal columns that printable text takes: two for East Asian wide characters and emoji, none for combining marks."""
    return sum(_cells(c) for c in text)


def _cells(character: str) -> int:
    if character == "\ufe0f":  # makes the sign before it an emoji, which some terminals widen: too many is safe
        return 1
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip(text: str, columns: int) -> str:
    """The longest beginning of the text that fits."""
    used = 0
    for i, character in enumerate(text):
        used += _cells(character)
        if used > columns:
            return text[:i]
    return text


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns`, broken at spaces where there are any (languages without spaces break anywhere)."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cells(joined) <= columns:
            lines[-1] = joined
            continue
        if not lines[-1]:
            lines.pop()
        while cells(word) > columns:
            piece = clip(word, columns) or word[0]
            lines.append(piece)
            word = word[len(piece) :]
        lines.append(word)
    return [line for line in lines if line] or [""]


def _short(seconds: float) -> str:
    """A duration as 02:15, or 1:02:15 from an hour on."""
    whole = max(0, int(seconds))
    return clock(whole).lstrip("0") if whole >= 36000 else clock(whole)[1:] if whole >= 3600 else clock(whole)[3:]


class LiveView:
    """Shows captions and how the run is doing. A context manager; safe to leave by Ctrl-C or to kill, for it never hides the cursor.

    On a terminal everything goes to `out`: captions scroll, the status line below them is redrawn in place. Elsewhere (a pipe, a file,
    TERM=dumb) `out` gets the captions alone, a line each, and `err` the rest, with a status line every 5 s at most. Colour is off where
    NO_COLOR is set (https://no-color.org). Words are shown through `printable`. Every method raises UserError if `out` can't be written to
    (BrokenPipeError if its reader has left); trouble with `err` is ignored.
    """

    def __init__(
        self,
        total_seconds: float | None = None,
        model_line: str = "",
        *,
        out: TextIO | None = None,
        err: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        """total_seconds: where the video ends, None for a live source. model_line: shown once, before the first round; may be set later."""
        self.total_seconds = total_seconds
        self.model_line = model_line
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._now = now  # seconds, for rates only
        self._live = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._lock = threading.RLock()  # the busy thread writes too
        self._model_shown = False
        self._fields: list[tuple[int, str]] = []  # the latest status, see _measure
        self._fraction: float | None = None
        self._phase = ""  # stands in for the status while set
        self._waits = 0  # which busy block is the innermost
        self._last = ("", -_STATUS_EVERY)  # the last plain status line and when it was written
        self._drawn = False  # a status line is on the screen
        self._closed = False

    def update(self, caption: Caption, position_s: float, speed: float, cache_fill: float, truth: str = "") -> None:
        """Shows one round; silence changes the status alone.

        position_s: how much of the video has been captioned, seconds. speed: seconds of video a second. cache_fill: 0 to 1. truth: what
        should have been said, shown below.
        """
        with self._lock:
            self._phase = ""
            if self.model_line and not self._model_shown:
                self._model_shown = True
                self.note(self.model_line)
            self._measure(position_s, speed, cache_fill)
            mark = f"[{clock(caption.start)}]"
            if not caption.silent:
                self._say(mark, printable(caption.text))
            if truth:
                self._say(mark if caption.silent else " " * len(mark), f"({printable(truth)})")
            elif caption.silent:
                self._show()

    def status(self, text: str) -> None:
        """Shows a phase, such as "loading", in place of the measurements, until the next round. For a wait of unknown length use `busy`."""
        with self._lock:
            self._phase = printable(text)
            self._show()

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        with self._lock:
            text = printable(text)
            if self._live:
                self._scroll(wrap(text, self._columns()))
            else:
                self._aside(text)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Says every 2 s or oftener, from a thread, that `text` still goes on, and for how long; blocks may be nested."""
        before, start, done = self._phase, self._now(), threading.Event()
        text = printable(text)
        self._waits += 1
        mine = self._waits
        every = _SPIN_EVERY if self._live else _BUSY_EVERY

        def tick() -> None:
            beat = 0
            while not done.wait(max(0.0, start + (beat + 1) * every - self._now())):
                beat = max(beat + 1, int((self._now() - start) / every))  # a thread that was starved doesn't catch up
                with self._lock:
                    if done.is_set() or self._closed:
                        return
                    if self._waits == mine:
                        self._wait_line(text, self._now() - start, beat)

        with self._lock:
            self._wait_line(text, 0.0, 0)
        thread = threading.Thread(target=tick, name="busy", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with self._lock:
                self._waits -= 1
                self._phase = before
                with contextlib.suppress(UserError, OSError):  # never in place of what went wrong inside the block
                    self._erase()
        took = self._now() - start
        if took >= _LONG:
            self.note(f"{text} took {_elapsed(took)}")

    def close(self) -> None:
        """Leaves the last status standing and the cursor on a fresh line. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            line = self._status_line()
            if self._live:
                with contextlib.suppress(UserError, OSError):
                    self._put((_CLEAR + self._dim(line) + "\n") if line else (_CLEAR if self._drawn else ""))
            elif line and line != self._last[0]:
                self._aside(line)

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # What is shown

    def _measure(self, position: float, speed: float, cache_fill: float) -> None:
        """Status fields in their order on the line, each with its rank: the highest goes first where the line is short."""
        total = self.total_seconds
        fields = [(0, clock(position) if total is None else f"{clock(position)} / {clock(total)}")]
        self._fraction = None
        if total is not None:
            self._fraction = min(1.0, max(0.0, position / total)) if total > 0 else 1.0
            fields.append((4, f"{int(100 * self._fraction):2}%"))
        fields.append((1, f"{speed:.1f}x"))
        fields.append((5, "real time"))
        fields.append((3, f"cache {100 * min(1.0, max(0.0, cache_fill)):.0f}%"))
        if total is not None and speed > 0:
            fields.append((2, f"ETA {_short((total - position) / speed)}"))
        self._fields = fields

    def _status_line(self) -> str:
        """The status in one line that fits; without a terminal, all of it and no bar."""
        if self._phase or not self._fields:
            return clip(self._phase, self._columns()) if self._live else self._phase
        fields = list(self._fields)
        columns = self._columns() if self._live else 1000
        while len(fields) > 1 and cells(_joined(fields)) > columns:
            fields.remove(max(fields))
        bar = min(_BAR.stop - 1, columns - cells(_joined(fields)) - len("  []"))
        if self._live and self._fraction is not None and bar >= _BAR.start:
            full = int(bar * self._fraction)
            fields.insert(1, (0, f"[{'#' * full}{'.' * (bar - full)}]"))
        return clip(_joined(fields), columns)

    def _columns(self) -> int:
        """Columns to use: three less than there are, as a full line wraps and Ctrl-C echoes ^C. Asked each time, as windows change size."""
        columns = 0
        with contextlib.suppress(OSError, ValueError, AttributeError):
            columns = os.get_terminal_size(self._out.fileno()).columns
        return max(1, (columns or shutil.get_terminal_size().columns) - 3)

    def _say(self, time_mark: str, words: str) -> None:
        if not self._live:
            self._put(f"{time_mark} {words}\n")
            self._show()
            return
        indent = len(time_mark) + 1
        first, *rest = wrap(words, max(10, self._columns() - indent))
        self._scroll([f"{self._dim(time_mark)} {first}", *(" " * indent + line for line in rest)])

    def _wait_line(self, text: str, elapsed: float, beat: int) -> None:
        if not self._live:
            self._aside(f"{text} {_elapsed(elapsed)}" if beat else text)
            return
        self._phase = f"{_SPINNER[beat % len(_SPINNER)]} {text} {_elapsed(elapsed)}"
        with contextlib.suppress(UserError, OSError):  # the thread has no one to tell; the next caption will
            self._show()

    # How it is written

    def _show(self) -> None:
        if self._closed:
            return
        line = self._status_line()
        if self._live:
            self._put(_CLEAR + self._dim(line))
            self._drawn = True
        elif line != self._last[0]:
            now = self._now()
            # A new phase is news and is told at once; a counter in its text, as the measurements, is not.
            new_phase = self._phase and _without_numbers(line) != _without_numbers(self._last[0])
            if new_phase or now - self._last[1] >= _STATUS_EVERY:
                self._last = (line, now)
                self._aside(line)

    def _erase(self) -> None:
        """Takes a wait off the screen; what the status was before shows again."""
        if self._live and not self._closed:
            line = self._status_line()
            self._drawn = bool(line)
            self._put(_CLEAR + self._dim(line))

    def _scroll(self, lines: list[str]) -> None:
        """Puts lines above the status line, which is drawn again below them."""
        above = (_CLEAR if self._drawn else "") + "".join(f"{line}\n" for line in lines)
        below = "" if self._closed else self._dim(self._status_line())
        self._drawn = bool(below)
        self._put(above + below)

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._colour and text else text

    def _put(self, text: str) -> None:
        """One write and a flush, so that neither Ctrl-C nor another writer comes between the parts of a line."""
        try:
            self._out.write(_encodable(text, self._out))
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"captions can't be shown: {error.strerror or error}") from error

    def _aside(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._err.write(_encodable(f"{text}\n", self._err))
            self._err.flush()


def _joined(fields: list[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in fields).replace("x  real time", "x real time")


def _elapsed(seconds: float) -> str:
    return f"{int(seconds)} s" if seconds < 60 else _short(seconds)


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "0", text)


def _encodable(text: str, stream: TextIO) -> str:
    """A caption in Chinese must not stop the program because the terminal speaks ASCII."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
