"""What a person sees: a pseudo-terminal read back through a small screen model, and plain streams."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svlm_jax.captions import Caption
from svlm_jax.errors import UserError
from svlm_jax.terminal import LiveView, cells, clip, printable, wrap

ROOT = Path(__file__).resolve().parents[1]
EVIL = "A goal!\x1b[2J\x1b]0;title\x07\r\n\x9b31m over \u202eabc"


class Screen:
    """The lines that a terminal of `width` columns would show. Any escape sequence but erase-line and colour is an error."""

    def __init__(self, width: int):
        self.width, self.lines, self.column, self.wraps = width, [""], 0, 0

    def feed(self, text: str) -> "Screen":
        for piece in re.findall(r"\x1b\[\d*[a-zA-Z]|.", text, re.DOTALL):
            if piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.lines.append("")
                self.column = 0
            elif piece == "\x1b[K":
                assert self.column == 0
                self.lines[-1] = ""
            elif piece.startswith("\x1b"):
                assert re.fullmatch(r"\x1b\[[02]m", piece), piece
            else:
                assert piece.isprintable() or piece in "\u200d\u200c", ascii(piece)
                assert self.column == cells(self.lines[-1])  # never types over what is there
                self.lines[-1] += piece
                self.column += cells(piece)
                self.wraps += self.column >= self.width
        return self


SHOW = """
import sys, time
from svlm_jax.captions import Caption
from svlm_jax.terminal import LiveView
with LiveView(30, "a model with a line that says what runs where", now=time.monotonic) as view:
    with view.busy("compiling"):
        time.sleep(1.2)
    texts = ["The red team kicks off from the left and moves up", "", sys.argv[1], "日本語の字幕がここに表示されますとても長い"]
    for i, text in enumerate(texts):
        view.update(Caption(i, i + 1, text), i + 1, 2.0, i / 4)
    if len(sys.argv) > 2:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
"""


def on_a_terminal(width: int, *arguments: str, interrupt: bool = False, **environment: str) -> str:
    """The raw text that the program sends to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    child = subprocess.Popen(
        [sys.executable, "-c", SHOW, *arguments],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=inherited | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environment},
    )
    os.close(theirs)
    assert child.stderr is not None
    with child.stderr:
        if interrupt:
            assert child.stderr.readline() == b"ready\n"
            os.write(ours, b"\x03")
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end has closed
                break
            if not piece:
                break
            shown += piece
        problems = child.stderr.read().decode()
    os.close(ours)
    assert child.wait() == 0 or interrupt, problems
    return shown.decode()


def test_narrow_terminal():
    raw = on_a_terminal(40, EVIL)
    screen = Screen(40).feed(raw)
    assert screen.wraps == 0
    assert screen.lines == [
        "a model with a line that says what",
        "runs where",
        "[00:00:00] The red team kicks off",
        "           from the left and moves up",
        "[00:00:02] A goal![2J]0;title 31m",
        "           over abc",
        "[00:00:03] 日本語の字幕がここに表示さ",
        "           れますとても長い",
        "00:00:04 / 00:00:30  2.0x  ETA 00:13",
        "",
    ]
    assert "| compiling 0 s" in raw and re.search(r"[-/|\\] compiling 1 s", raw)
    assert "\x1b[?25l" not in raw


def test_wide_terminal():
    screen = Screen(100).feed(on_a_terminal(100, EVIL))
    assert screen.wraps == 0
    assert screen.lines[1] == "[00:00:00] The red team kicks off from the left and moves up"
    assert screen.lines[-2] == "00:00:04 / 00:00:30  [####...........................]  13%  2.0x real time  cache 75%  ETA 00:13"
    assert screen.lines[-1] == ""


def test_no_color():
    raw = on_a_terminal(100, EVIL, NO_COLOR="1")
    assert "\x1b[K" in raw and not re.search(r"\x1b\[\d*m", raw)


def test_ctrl_c_leaves_a_fresh_line():
    raw = on_a_terminal(60, EVIL, "wait", interrupt=True)
    assert raw.endswith("\n") and "\x1b[?25l" not in raw
    screen = Screen(60).feed(raw)
    assert screen.lines[-2:] == ["00:00:04 / 00:00:30  13%  2.0x  cache 75%  ETA 00:13", ""]


def test_dumb_terminal_is_no_terminal():
    assert "\x1b" not in on_a_terminal(60, EVIL, TERM="dumb")


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def plain(total: float | None = None, **settings) -> tuple[LiveView, io.StringIO, io.StringIO, Clock]:
    out, err, now = io.StringIO(), io.StringIO(), Clock()
    return LiveView(total, out=out, err=err, now=now, **settings), out, err, now


def test_plain_streams():
    view, out, err, now = plain(20, model_line="a model")
    with view:
        for i in range(12):
            now.seconds = i
            view.update(Caption(i, i + 1, "" if i % 2 else f"round {i}"), i + 1, 1.0, 0.5)
    assert out.getvalue().splitlines() == [f"[00:00:{i:02}] round {i}" for i in range(0, 12, 2)]
    assert err.getvalue().splitlines() == [
        "a model",
        *(f"00:00:{i:02} / 00:00:20  {5 * i:2}%  1.0x real time  cache 50%  ETA 00:{20 - i:02}" for i in (1, 6, 11, 12)),
    ]


def test_live_source_has_no_end():
    view, _, err, _ = plain()
    view.update(Caption(0, 1, ""), 3700, 0.98, 1.2)
    assert err.getvalue() == "01:01:40  1.0x real time  cache 100%\n"


def test_phases():
    view, _, err, now = plain()
    for i in range(12):
        now.seconds = i
        view.status(f"loading {i}/12")
    view.status("compiling")
    view.status("compiling")
    view.close()
    assert err.getvalue().splitlines() == ["loading 0/12", "loading 5/12", "loading 10/12", "compiling"]


def test_busy_speaks_every_second_and_stops():
    out, err = io.StringIO(), io.StringIO()
    view = LiveView(out=out, err=err)
    with view.busy("compiling"):
        time.sleep(2.4)
    assert re.fullmatch(r"compiling\ncompiling 1 s\n(compiling \d+ s\n)*compiling took \d+ s\n", err.getvalue())
    with pytest.raises(ZeroDivisionError), view.busy("loading"):
        raise ZeroDivisionError
    assert err.getvalue().endswith("loading\n") and out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nested_busy_and_what_comes_back(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with LiveView(out=out) as view:
        view.update(Caption(0, 1, ""), 1, 1.0, 0)
        with view.busy("outer"), view.busy("inner"):
            time.sleep(0.7)
        assert Screen(60).feed(out.getvalue()).lines == ["00:00:01  1.0x real time  cache 0%"]
    first, *_, last = (match.start() for match in re.finditer("inner", out.getvalue()))
    assert "outer" not in out.getvalue()[first:last]


@pytest.mark.parametrize("columns", [1, 5, 12, 20, 33, 64, 75, 80, 200])
def test_no_width_wraps_the_status(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    for total in (None, 0.0, 400000.0):
        out = Terminal()
        with LiveView(total, out=out) as view:
            view.status("コンパイル中 " * 9)
            for position in (0, 399999, 500000):
                view.update(Caption(0, 1, ""), position, 0.0 if position == 0 else 12.34, 0.5)
        assert Screen(columns).feed(out.getvalue()).wraps == 0 or columns == 1


def test_terminal_that_speaks_ascii():
    raw = io.BytesIO()
    view = LiveView(out=io.TextIOWrapper(raw, "ascii"), err=io.StringIO())
    view.update(Caption(0, 1, "café 日本"), 1, 1.0, 0)
    assert raw.getvalue() == b"[00:00:00] caf? ??\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_output():
    with open("/dev/full", "wb", buffering=0) as raw:
        out = io.TextIOWrapper(raw, write_through=True)
        view = LiveView(out=out, err=out)
        with pytest.raises(UserError, match="No space left"):
            view.update(Caption(0, 1, "a"), 1, 1.0, 0)
        view.status("trouble with the status is ignored")
        view.close()
        out.detach()


anything = st.text(st.characters(codec=None, exclude_categories=()))


@given(anything)
def test_printable_is_one_harmless_line(text):
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", printable(text))


@given(anything.map(printable), st.integers(2, 30))
def test_wrap_fits_and_loses_no_word(text, columns):
    lines = wrap(text, columns)
    assert all(cells(line) <= columns for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert cells(clip(text, columns)) <= columns


def test_widths():
    assert [cells(text) for text in ("abc", "日本", "e\u0301", "⚽", "\u200d", "")] == [3, 4, 1, 2, 0, 0]
