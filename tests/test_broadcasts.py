"""Live sources of real servers on this machine: RTSP from GStreamer, and a growing HLS play list. Both stop, and come back."""

import contextlib
import functools
import http.server
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from svlm_jax.demo.clip import sample_path
from svlm_jax.serving.limits import Limits
from svlm_jax.serving.pushed import LiveSource
from svlm_jax.serving.sources import Grid, Shape

SHAPE = Shape(fps=2.0, chunk_seconds=1.0, frames=2, height=84, width=112)
RTSP_SERVER = Path(__file__).with_name("rtsp_server.py")
PROBE = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
ENOUGH = 120.0  # seconds, on a machine that is busy


@functools.cache
def python_with_gstreamer() -> str | None:
    """A Python that has GStreamer's RTSP server."""
    for python in dict.fromkeys((sys.executable, shutil.which("python3"), "/usr/bin/python3")):
        if python and os.path.exists(python) and subprocess.run([python, "-c", PROBE], capture_output=True).returncode == 0:
            return python
    return None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class Watched:
    """A live source and what it told: the pictures that its rounds begin with are kept."""

    def __init__(self, url: str, **limits: float):
        self.told: list[dict] = []
        self.pictures: list[np.ndarray] = []
        self.starts: list[float] = []
        self.source = LiveSource(
            url, SHAPE, Limits(**limits), lambda: None, lambda kind, **data: self.told.append(data), grid=Grid(time.monotonic(), 1.0)
        )

    def rounds(self, count: int) -> None:
        """Until so many more have come."""
        until, end = len(self.pictures) + count, time.monotonic() + ENOUGH
        while len(self.pictures) < until:
            assert time.monotonic() < end, (self.told, self.source.counts)
            if self.source.ready():
                taken = self.source.take()
                self.pictures.append(taken.frames[0])
                self.starts.append(taken.start)
            time.sleep(0.01)

    def until_told(self) -> dict:
        """The next time that the source has to be opened again."""
        known, end = len(self.told), time.monotonic() + ENOUGH
        while len(self.told) == known:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self.told[known]


@contextlib.contextmanager
def watched(url: str, **limits: float) -> Iterator[Watched]:
    found = Watched(url, **limits)
    try:
        yield found
    finally:
        found.source.close()


def differ(pictures: list[np.ndarray]) -> bool:
    return any((one != other).any() for one, other in itertools.pairwise(pictures))


@contextlib.contextmanager
def rtsp(port: int) -> Iterator[None]:
    python = python_with_gstreamer()
    assert python is not None
    with subprocess.Popen([python, str(RTSP_SERVER), str(port), str(sample_path())], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "listening\n"
            yield
        finally:
            process.kill()


@pytest.mark.skipif(python_with_gstreamer() is None, reason="no Python here has GStreamer's RTSP server (gi.repository.GstRtspServer)")
def test_an_rtsp_server_that_is_stopped_and_started_again():
    port = free_port()
    with contextlib.ExitStack() as first, watched(f"rtsp://127.0.0.1:{port}/clip") as seen:
        first.enter_context(rtsp(port))
        seen.rounds(4)
        assert seen.source.info["codec"] == "h264" and differ(seen.pictures)
        first.close()
        assert seen.until_told()["state"] == "reconnecting"
        before = len(seen.pictures)
        with rtsp(port):
            seen.rounds(4)
            assert differ(seen.pictures[before:])
            assert seen.starts == sorted(set(seen.starts))  # the stream's time went on, and nothing came twice


# HLS


class Broadcast:
    """The bundled clip as HLS: segments of a second by PyAV, listed one by one as time goes by."""

    def __init__(self, folder: Path):
        self.folder, self.segments = folder, []
        how = {"hls_time": "1", "hls_list_size": "0"}
        with av.open(str(sample_path())) as clip, av.open(str(folder / "all.m3u8"), "w", format="hls", options=how) as out:
            source = clip.streams.video[0]
            target = out.add_stream("libx264", rate=10, options={"g": "10", "sc_threshold": "0", "preset": "ultrafast"})
            target.width, target.height, target.pix_fmt = source.width, source.height, "yuv420p"
            for number, picture in enumerate(clip.decode(source)):
                picture.pts, picture.time_base = number, Fraction(1, 10)
                out.mux(target.encode(picture))
            out.mux(target.encode(None))
        self.segments = sorted(folder.glob("*.ts"), key=lambda path: (len(path.name), path.name))
        self.first = self.stop = 0
        self.running = threading.Event()
        self._write()

    def _write(self) -> None:
        lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:1", f"#EXT-X-MEDIA-SEQUENCE:{self.first}"]
        for number in range(self.first, self.stop):
            lines += ["#EXTINF:1.0,", self.segments[number % len(self.segments)].name]
        draft = self.folder / "draft"
        draft.write_text("\n".join(lines) + "\n")
        draft.replace(self.folder / "live.m3u8")

    def grow(self) -> None:
        self.stop += 1
        self.first = max(0, self.stop - 5)
        self._write()

    def keep_growing(self, ended: threading.Event) -> None:
        while not ended.wait(0.9):
            if self.running.is_set():
                self.grow()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder: Path, port: int = 0) -> Iterator[int]:
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        server.handle_error = lambda *_: None  # clients that leave early
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_an_hls_list_that_grows_stalls_and_comes_back(tmp_path):
    broadcast, ended = Broadcast(tmp_path), threading.Event()
    for _ in range(3):
        broadcast.grow()
    assert len(broadcast.segments) >= 10
    growing = threading.Thread(target=broadcast.keep_growing, args=(ended,))
    growing.start()
    broadcast.running.set()
    try:
        with served(tmp_path) as port, watched(f"http://127.0.0.1:{port}/live.m3u8", stall_seconds=15.0) as seen:
            seen.rounds(4)
            assert differ(seen.pictures) and seen.source.info["codec"] == "h264"
            broadcast.running.clear()  # nothing new is listed
            seen.until_told()
            broadcast.running.set()
            before = len(seen.pictures)
            seen.rounds(4)
            assert differ(seen.pictures[before:])
        with watched(f"http://127.0.0.1:{port}/live.m3u8", stall_seconds=15.0) as seen:  # the server itself is gone, and returns
            seen.until_told()
            with served(tmp_path, port):
                seen.rounds(3)
                assert differ(seen.pictures)
    finally:
        ended.set()
        growing.join()
