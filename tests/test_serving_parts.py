"""The server's parts, one by one, without an engine."""

import asyncio
import dataclasses
import http.server
import io
import math
import os
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction

import av
import httpx
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from server import ROOT
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

from svlm_jax.config import StreamConfig
from svlm_jax.data.video import read_rounds
from svlm_jax.demo.clip import sample_path
from svlm_jax.errors import UserError
from svlm_jax.serving.child import Decoder
from svlm_jax.serving.clocks import Moment
from svlm_jax.serving.decoder import fit
from svlm_jax.serving.events import Journal
from svlm_jax.serving.guard import Guard
from svlm_jax.serving.limits import Full, Limits, Rate, Refused, TooFast
from svlm_jax.serving.metrics import Metrics
from svlm_jax.serving.origins import Allowed, shown
from svlm_jax.serving.pushed import LiveSource, PushedSource
from svlm_jax.serving.scheduler import Scheduler
from svlm_jax.serving.server import listen
from svlm_jax.serving.sessions import Session, Sessions, Wish, log
from svlm_jax.serving.snapshots import Shelf
from svlm_jax.serving.sources import FileSource, Grid, Shape
from svlm_jax.serving.sse import EventStream

SHAPE = Shape(fps=2.0, chunk_seconds=1.0, frames=2, height=28, width=56)


def wait(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def drained(source) -> list:
    """All rounds of a source, to its end."""
    rounds = []
    wait(lambda: (source.ready() and rounds.append(source.take())) or source.ended)
    return rounds


def frame(value: int) -> np.ndarray:
    return np.full((3, 28, 56), value, np.uint8)


def pushed(live: bool = False, **more) -> PushedSource:
    return PushedSource(SHAPE, Limits(), lambda: None, live=live, grid=Grid(time.monotonic(), 1.0), **more)


# Sources


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=25))
def test_pushed_frames_are_shown_as_a_file_s_are(steps):
    """Frame i of round r is the last one that begins at or before r + i / 2, as in `data.video`; the last frame is shown for 1 / 2 s."""
    times = np.cumsum([0, *steps]) / 10
    source = pushed()
    for index, seconds in enumerate(times):
        wait(source.has_room)
        source.push(frame(index), 7.0 + seconds)
    source.finish()
    rounds = drained(source)
    assert len(rounds) == math.ceil(times[-1] + 0.5 - 1e-6)
    for index, round in enumerate(rounds):
        assert (round.start, round.end) == (index, index + 1)
        for half in (0, 1):
            sample = index + half / 2
            assert round.frames[half, 0, 0, 0] == np.flatnonzero(times <= sample + 1e-6)[-1]
    assert source.counts.received == len(times) and source.counts.dropped == 0


def test_a_long_time_without_frames_is_left_out():
    source = pushed()
    for index, seconds in enumerate((0.0, 0.5, 3600.2, 3600.7)):
        source.push(frame(index), seconds)
    source.finish()
    assert [round.start for round in drained(source)] == [0.0, 3600.0, 3601.0]


def test_a_sender_by_the_file_s_clock_waits_and_one_by_the_live_clock_never_does():
    source, live = pushed(), pushed(live=True)
    try:
        for index in range(1000):
            if not source.has_room():
                break
            source.push(frame(0), float(index))
        assert 60 <= index < 80
        for _ in range(200):
            assert live.has_room()
            live.push(frame(0))
        assert live.counts.thinned >= 197
    finally:
        source.close()
        live.close()
    with pytest.raises(UserError, match="has ended"):
        source.push(frame(0), 5000.0)


def test_the_newest_live_round_wins():
    source = pushed(live=True)
    try:
        end = time.monotonic() + 2.7
        while time.monotonic() < end:
            source.push(frame(0))
            time.sleep(0.05)
        round = source.take()
        assert round is not None and round.start >= 1.0 and source.take() is None
        assert source.counts.dropped >= 2
        assert time.monotonic() - round.arrived < 1.2
    finally:
        source.close()


def test_frames_that_come_too_fast_and_clients_that_fall_silent():
    source = PushedSource(SHAPE, Limits(idle_seconds=0.2), lambda: None, live=True, grid=Grid(time.monotonic(), 1.0))
    with pytest.raises(TooFast):
        for _ in range(300):
            source.push(b"no picture")
    wait(lambda: source.ended)
    assert "no frame came for 0.2 s" in source.failure
    now = [0.0]
    rate = Rate(10.0, now=lambda: now[0])
    assert [rate.take() for _ in range(41)] == [True] * 40 + [False]
    now[0] = 0.1
    assert rate.take() and not rate.take()


def test_a_file_is_read_as_on_the_command_line():
    shape = Shape(fps=2.0, chunk_seconds=1.0, frames=2, height=84, width=112)
    rounds = drained(FileSource(str(sample_path()), shape, Limits(), lambda: None, paced=False, start=2.0, duration=3.0))
    expected = list(read_rounds(sample_path(), fps=2.0, chunk_seconds=1.0, start=2.0, duration=3.0, size=(84, 112)))
    assert [(r.start, r.end) for r in rounds] == [(r.start, r.end) for r in expected]
    for ours, theirs in zip(rounds, expected, strict=True):
        assert (ours.frames.transpose(0, 2, 3, 1) == theirs.frames).all()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("content", [b"", b"\0" * 4000, b"ffconcat version 1.0\nfile /etc/hostname\n", PLAYLIST])
def test_hostile_files_fail_in_one_line(tmp_path, content):
    """Lists that name other files among them: a stream's file opens nothing besides."""
    path = tmp_path / "a.m3u8"
    path.write_bytes(content)
    source = FileSource(str(path), SHAPE, Limits(), lambda: None, paced=False)
    assert drained(source) == []
    assert str(path) in source.failure and "hostname" not in source.failure


def test_a_decoder_that_dies_or_takes_too_much_takes_nothing_with_it():
    source = FileSource(str(sample_path()), SHAPE, Limits(decoder_bytes=64 << 20), lambda: None, paced=False)
    assert drained(source) == [] and source.failure
    source = FileSource(str(sample_path()), SHAPE, Limits(), lambda: None, paced=False)
    wait(source.ready)
    source._decoder._process.kill()
    drained(source)
    assert source.failure == "" or "ended by signal 9" in source.failure  # a short clip may have been read by then


def test_a_source_that_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.mp4"
        source = FileSource(url, SHAPE, Limits(stall_seconds=0.5), lambda: None, paced=False)
        assert drained(source) == [] and "nothing came of it for 0.5 s" in source.failure


@pytest.fixture
def web():
    """The bundled clip at /clip.mp4, and /away, which redirects to it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "/clip.mp4")
                self.end_headers()
                return
            data = sample_path().read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # clients that leave early
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_url_is_read_and_may_not_redirect(web):
    rounds = drained(FileSource(f"{web}/clip.mp4", SHAPE, Limits(), lambda: None, paced=False, duration=2.0))
    assert len(rounds) == 2
    source = FileSource(f"{web}/away", SHAPE, Limits(), lambda: None, paced=False, duration=2.0)
    assert drained(source) == [] and "cannot be opened" in source.failure


def test_a_live_source_is_opened_again(web):
    """The clip, served as a broadcast: shown at its own speed; where it cannot be opened, tried again after a while."""
    told: list[dict] = []
    grid = Grid(time.monotonic(), 1.0)
    gone = LiveSource(f"{web}/away", SHAPE, Limits(), lambda: None, lambda type, **data: told.append(data), grid=grid)
    source = LiveSource(f"{web}/clip.mp4", SHAPE, Limits(), lambda: None, lambda *_, **__: None, grid=grid)
    try:
        wait(source.ready)
        first = source.take()
        wait(source.ready)
        second = source.take()
        assert (first.frames != second.frames).any() and second.start - first.start == 1.0
        wait(lambda: len(told) >= 2)
        assert [data["seconds"] for data in told[:2]] == [1.0, 2.0] and told[0]["state"] == "reconnecting"
    finally:
        source.close()
        gone.close()


def test_a_live_source_whose_clock_is_set_goes_on(tmp_path):
    """An hour forward: its pictures are not held up."""
    path = tmp_path / "set.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 56, 28, "yuvj420p"
        for index in range(20):
            picture = av.VideoFrame.from_ndarray(np.full((28, 56, 3), 8 * index, np.uint8), format="rgb24").reformat(format="yuvj420p")
            for packet in stream.encode(picture):
                packet.pts = packet.dts = 100 * index + (3_600_000 if index >= 10 else 0)
                packet.time_base = Fraction(1, 1000)
                out.mux(packet)
    decoder = Decoder(mode="live", source=str(path), fps=10.0, memory=Limits().decoder_bytes, **SHAPE.size)
    try:
        shown = [(time.monotonic(), payload[-1]) for kind, payload in decoder.messages() if kind == b"F"]
    finally:
        decoder.close()
    assert sum(value < 76 for _, value in shown) >= 7 and sum(value > 76 for _, value in shown) >= 7
    assert shown[-1][0] - shown[0][0] < 20  # each of the ten would wait for 5 s and more


def test_other_shapes_get_black_sides():
    white = np.full((100, 100, 3), 255, np.uint8)
    out = fit(white, (56, 112))
    assert out.shape == (56, 112, 3) and (out[:, 28:84] == 255).all() and not out[:, :28].any() and not out[:, 84:].any()
    assert (fit(np.full((480, 850, 3), 255, np.uint8), (252, 448)) == 255).all()  # nearly the shape: stretched, as files are


# What may be opened


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.mp4",
        "http://localhost/a.mp4",
        "http://[::1]/a.mp4",
        "http://2130706433/a.mp4",
        "http://0x7f.1/a.mp4",
        "http://169.254.169.254/latest/meta-data",
        "http://good.example@evil.example/a.mp4",
        "http://good.example:81/a.mp4",
        "http://good.example.evil.example/a.mp4",
        "http://evilgood.example/a.mp4",
        "gopher://good.example/a",
        "concat:http://good.example/a|/etc/passwd://",
        "http://good.example/a b",
        "http://[good.example/a",
        "http://10.0.0.5/a",
    ],
)
def test_addresses_that_are_refused(url):
    with pytest.raises(Refused):
        Allowed(hosts=("good.example:80", "*.cdn.example", "*")[:2]).url(url)


def test_addresses_that_are_allowed(monkeypatch):
    found = {"good.example": "93.184.216.34", "a.cdn.example": "2606:2800:220:1::1", "inside.example": "10.1.2.3", "mapped.example": "::ffff:127.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (found[host], port))])
    allowed = Allowed(hosts=("good.example", "*.cdn.example", "inside.example", "mapped.example", "10.1.2.3:554"))
    for url in ("https://good.example/a.mp4", "http://a.cdn.example/x", "rtsp://u:p@10.1.2.3/s", "rtsp://GOOD.example:8554/s"):
        assert allowed.url(url) == url
    for url in ("http://inside.example/a", "http://mapped.example/a", "http://10.1.2.3/a"):
        with pytest.raises(Refused):
            allowed.url(url)
    assert shown("rtsp://user:secret@10.1.2.3/s?token=1") == "rtsp://10.1.2.3/s"


def test_files_below_a_folder_alone(tmp_path):
    inside, outside = tmp_path / "videos", tmp_path / "secret.mp4"
    (inside / "a").mkdir(parents=True)
    (inside / "a" / "b.mp4").write_bytes(b"x")
    outside.write_bytes(b"x")
    (inside / "link.mp4").symlink_to(outside)
    os.mkfifo(inside / "pipe.mp4")
    allowed = Allowed(folders=(inside,))
    assert allowed.file("a/b.mp4") == allowed.file(str(inside / "a" / "b.mp4")) == str(inside / "a" / "b.mp4")
    for name in ("../secret.mp4", "link.mp4", "pipe.mp4", str(outside), "a", "none.mp4", "a\0b"):
        with pytest.raises(Refused):
            allowed.file(name)


# Journals and listeners


def test_a_journal_says_what_it_no_longer_has():
    journal = Journal(3)
    for index in range(5):
        journal.publish("segment", start=index)
    events, missed = journal.after(0)
    assert [event.id for event in events] == [3, 4, 5] and missed == 2
    assert journal.after(3) == (events[1:], 0) and journal.after(5) == ([], 0) and journal.after(99) == ([], 0)
    journal.publish("end", reason="finished")
    journal.publish("segment", start=9)
    assert journal.last == 6 and journal.ended


def test_a_listener_that_takes_nothing_is_left_and_one_that_missed_some_is_told():
    journal = Journal(2)
    for index in range(4):
        journal.publish("segment", start=index)
    sent: list[bytes] = []

    async def run(blocked: bool) -> float:
        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            if blocked and message["type"].endswith("body"):
                await asyncio.Event().wait()
            sent.append(message.get("body", b""))
            if b"id: 4" in sent[-1]:
                journal.publish("end", reason="finished")

        began = time.monotonic()
        await EventStream(journal, 0, 0.2)({"type": "http"}, receive, send)
        assert not journal.listeners
        return time.monotonic() - began

    assert 0.15 < asyncio.run(run(True)) < 5
    asyncio.run(run(False))
    text = b"".join(sent).decode()
    assert 'event: gap\ndata: {"type": "gap", "reason": "history", "events": 2}' in text
    assert text.index("events") < text.index("id: 3\ndata") < text.index("id: 4\ndata") < text.index("id: 5\nevent: end")


# Clocks, keys, places, addresses, disks


def test_time_since_a_snapshot_is_that_of_the_machine_where_it_is_the_same():
    taken = Moment(wall=1000.0, up=50.0, boot="a")
    assert taken.until(Moment(90_000.0, 53.0, "a")) == taken.until(Moment(-90_000.0, 53.0, "a")) == 3.0
    assert taken.until(Moment(1007.0, 53.0, "b")) == 7.0  # another machine, or started again
    assert taken.until(Moment(900.0, 53.0, "b")) == taken.until(Moment(math.nan, 53.0, "b")) == 0.0
    assert Moment(1000.0, 0.0, "").until(Moment(1002.0, 0.0, "")) == 2.0  # a system that tells no more
    first = Moment.now()
    time.sleep(0.02)
    assert 0.01 < first.until(Moment.now()) < 5


def test_keys_are_needed_where_there_are_some():
    async def words(request):
        return PlainTextResponse(request.state.owner or "nobody")

    async def greet(socket):
        await socket.accept()
        await socket.send_text(socket.state.owner)
        await socket.close()

    routes = [Route(path, words) for path in ("/health", "/ready", "/metrics", "/v1/streams")] + [WebSocketRoute("/v1/realtime", greet)]
    app = Guard(Starlette(routes=routes), keys=["one", "two"], metrics=Metrics(), host="127.0.0.1")
    open_app = Guard(Starlette(routes=routes), keys=[], metrics=Metrics(), host="127.0.0.1")

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://any.example") as http:
            for path in ("/metrics", "/v1/streams"):
                assert (await http.get(path)).status_code == 401
                for wrong in ("Bearer three", "Bearer ", "Basic one", "one"):
                    assert (await http.get(path, headers={"Authorization": wrong})).status_code == 401
            assert (await http.get("/health")).status_code == (await http.get("/ready")).status_code == 200
            owners = [(await http.get("/v1/streams", headers={"Authorization": f"Bearer {key}"})).text for key in ("one", "two", "one")]
            assert owners[0] == owners[2] != owners[1] and "one" not in owners[0]
            evil = {"Authorization": "Bearer one", "Origin": "https://evil.example"}
            assert (await http.get("/v1/streams", headers=evil)).status_code == 403
        async with httpx.AsyncClient(transport=httpx.ASGITransport(open_app), base_url="http://localhost") as http:
            assert (await http.get("/v1/streams")).text == "nobody"
            assert (await http.get("/v1/streams", headers={"Host": "rebound.example"})).status_code == 403

    asyncio.run(run())

    async def closed(protocols: str) -> list:
        sent, received = [], [{"type": "websocket.connect"}]
        headers = [(b"host", b"any.example"), (b"sec-websocket-protocol", protocols.encode())]
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers, "query_string": b"", "subprotocols": [], "server": ("a", 1)}

        async def receive():
            return received.pop(0)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent

    assert asyncio.run(closed("realtime"))[-1]["code"] == 1008
    assert asyncio.run(closed("realtime, openai-insecure-api-key.two"))[-1]["code"] == 1000


def test_a_stream_that_would_miss_its_deadlines_is_refused():
    """By the measured time of a round: live streams are, files are not; and each key has its share."""
    sessions = Sessions(4, Limits(streams_per_key=1), Metrics(), lambda: None)
    now = [0.0]
    engine = small.engine(StreamConfig(vision_window=2, text_window=2), layers=0)
    scheduler = Scheduler(engine, sessions, sessions.metrics, now=lambda: now[0])

    def admit(owner: str, live: bool) -> None:
        sessions.admit(Session(f"strm_{owner}{live}", Wish(), Journal(10), owner=owner), lambda: pushed(live=live), live=live)

    with pytest.raises(Full, match="still loading"):
        admit("a", True)
    scheduler.ready = True
    for seconds in [0.2] * 59 + [1.7]:  # one slow round is no obstacle
        scheduler.measure(seconds)
    admit("a", True)
    with pytest.raises(Full, match="this key has 1 streams"):
        admit("a", False)
    for seconds in [0.97] * 5:
        scheduler.measure(seconds)
    with pytest.raises(Full, match=r"a round takes 0\.97 s here and there is one every 1 s"):
        admit("b", True)
    admit("b", False)
    now[0] = 100.0
    trials = iter([1.4, 0.3])  # nothing runs: measured again for whoever asks next, and what was slow before is forgotten
    scheduler._trial = lambda: next(trials)
    assert scheduler._wait() == ()
    with pytest.raises(Full, match=r"a round takes 1\.40 s"):
        admit("b2", True)
    assert scheduler._wait() == ()
    assert scheduler.round_seconds() == 0.3
    scheduler.measure(0.99)
    with pytest.raises(Full, match=r"a round takes 0\.99 s"):
        admit("b2", True)
    now[0] = 300.0  # long ago: the best time counts
    admit("c", True)
    sessions.draining = True
    with pytest.raises(Full, match="about to stop"):
        admit("d", False)
    for session in sessions.all():
        sessions.end(session, "deleted")


def test_a_log_that_nobody_reads_is_no_failure(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    pipe = io.FileIO(writing, "w")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, write_through=True))
    with pytest.raises(BrokenPipeError):
        sys.stdout.write("x")
    log("server.draining")
    pipe.close()


def test_addresses_that_cannot_be_listened_on():
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="is in use: give another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(UserError, match="--host"):
            listen(host, 0)


FULL = """
import resource, signal, sys
from pathlib import Path
from svlm_jax.serving.limits import Refused
from svlm_jax.serving.snapshots import Shelf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Shelf(Path(sys.argv[1]), 9).write("strm_0123456789abcdef", bytes(100_000))
except Refused as error:
    print(error.status, error)
"""


def test_a_full_disk_keeps_the_snapshot_that_was_there(tmp_path):
    """The disk is full for real: by a limit of the process on the size of its files."""
    shelf = Shelf(tmp_path, 2)
    shelf.write("strm_0123456789abcdef", b"before")
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("507 the snapshot could not be written: File too large"), done.stderr
    assert shelf.read("strm_0123456789abcdef") == b"before" and [path.name for path in tmp_path.iterdir()] == ["strm_0123456789abcdef.svlm"]
    os.utime(shelf.path("strm_0123456789abcdef"), (1, 1))
    for index in (1, 2):  # the oldest goes
        shelf.write(f"strm_000000000000000{index}", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strm_0000000000000001.svlm", "strm_0000000000000002.svlm"]
    future = time.time() + 7200
    os.utime(shelf.path("strm_0000000000000002"), (future, future))
    shelf.write("strm_0000000000000003", b"x")  # the clock was set back by two hours: this one is the newest all the same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strm_0000000000000002.svlm", "strm_0000000000000003.svlm"]
    shelf.write("strm_0000000000000004", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strm_0000000000000003.svlm", "strm_0000000000000004.svlm"]
    for id in ("../x", "strm_0123", "strm_0123456789abcdef/.."):
        with pytest.raises(Refused):
            shelf.read(id)


def test_limits_are_what_the_operator_reads_in_the_docs():
    """Each limit is in docs/operate.md, with its value."""
    text = (ROOT / "docs" / "operate.md").read_text("utf-8")
    for field in dataclasses.fields(Limits):
        assert f"`{field.name}`" in text, field.name
