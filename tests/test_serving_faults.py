"""What no client should send, and some do: nothing ends, nobody is disturbed, and the server is as ready as before.

    MALFORMED_MESSAGES=10000 pytest tests/test_serving_faults.py            takes minutes; 1,000 are sent otherwise
"""

import asyncio
import calendar
import itertools
import json
import os
import random
import resource
import socket
import string
import struct
import sys
import threading
import time
from pathlib import Path

import av
import httpx
import pytest
import websockets
from server import Server, picture
from websockets.asyncio.client import connect

from svlm_jax.demo.clip import sample_path

COUNT = int(os.environ.get("MALFORMED_MESSAGES", 1_000))
MESSAGES = {"text": COUNT * 3 // 10, "binary": COUNT * 2 // 10, "http": COUNT - COUNT * 5 // 10}
WITNESS_FRAMES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


# Read by the server's Python as it starts: a wall clock that is set by writing to a file
WALL_CLOCK = """
import os, time
real, real_gmtime = time.time, time.gmtime

def now():
    with open(os.environ["WALL_CLOCK"]) as file:
        return real() + float(file.read())

time.time, time.time_ns = now, lambda: round(now() * 1e9)
time.gmtime = lambda seconds=None: real_gmtime(now() if seconds is None else seconds)
"""


class WallClock:
    """The server's wall clock, and nothing else of its machine."""

    def __init__(self, folder: Path):
        (folder / "sitecustomize.py").write_text(WALL_CLOCK)
        self.file = folder / "seconds"
        self.environment = {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "WALL_CLOCK": str(self.file)}
        self.set(0)

    def set(self, hours: float) -> None:
        draft = self.file.with_suffix(".part")
        draft.write_text(str(3600 * hours))
        draft.replace(self.file)


@pytest.fixture(scope="module")
def wall_clock(tmp_path_factory):
    return WallClock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(folder, state, wall_clock):
    # In float32 no token hangs on the order of sums, which is another one when a stream leaves its row for a round
    in_a_hurry = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # to compile
    flags = ["--streams", "3", "--dtype", "float32", "--allow-files", str(folder), "--state", str(state)]
    server = Server(*flags, env=in_a_hurry | wall_clock.environment)
    try:
        yield server.ready()
    finally:
        code = server.stop()
    assert code == 0 and not server.errors


class Witness:
    """A stream that nothing is wrong with, beside those that all is wrong with; its words are known from a run alone."""

    def __init__(self, server: Server):
        self.server = server
        self.alone, self.disturbed = [], []
        self._watch(self.alone, self._open())
        self._thread = threading.Thread(target=self._watch, args=(self.disturbed, self._open()))

    def _open(self) -> str:
        return self.server.open(source="push", clock="file", seed=5)

    def _watch(self, captions: list[dict], id: str) -> None:
        for index in range(WITNESS_FRAMES):
            assert self.server.push(id, picture(index)).status_code == 202
        self.server.push(id, last=1)
        captions += self.server.captions(id)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join()
        assert len(self.alone) == WITNESS_FRAMES // 2
        assert self.disturbed == self.alone
        assert self.server.http.get("/ready").status_code == 200
        assert not [line for line in self.server.lines if line["event"] == "server.error"]


# Messages


def junk(rng: random.Random, depth: int = 0):
    """Any JSON value."""
    kinds = [None, True, -1, 2**70, 1e308, float("nan"), "", "\ud800", "\x00", "ключ" * rng.randrange(9), "data:image/png;base64,%%%"]
    if depth < 3 and rng.random() < 0.5:
        inner = [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
        return inner if rng.random() < 0.5 else {rng.choice(NAMES): value for value in inner}
    return rng.choice(kinds)


NAMES = ["type", "item", "content", "session", "instructions", "text", "role", "svlm", "image_url", "response", "source", "seed", "start", "é"]
EVENTS = [
    {"type": "session.update", "session": {"type": "realtime", "instructions": "Look."}},
    {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Who?"}]}},
    {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "x"}]}},
    {"type": "response.create", "response": {"instructions": "Now?"}},
    {"type": "response.cancel"},
]
BODIES = {  # path -> what it takes
    "/v1/streams": {"source": "push", "clock": "file", "query": "What?", "seed": 3, "previous_text": "So", "start": 0, "pace": "fast"},
    "/v1/streams/{id}/questions": {"text": "Who?"},
    "/v1/streams/{id}/frames?t={n}": {},
    "/v1/streams/{id}/frames?last={n}&t=x": {},
    "/v1/streams/{id}/{word}": {},
    "/v1/chat/completions": {"model": "x", "messages": [], "stream": False},
    "/v1/snapshots": {},
    "/v1/{word}?{word}=%ff%00": {},
}


def spoiled(rng: random.Random, value: dict):
    """A value of a right form with something wrong in it."""
    copy = json.loads(json.dumps(value))
    place = copy
    while True:
        if not place:
            break
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        if isinstance(place, dict) and rng.random() < 0.3:
            del place[key]
        else:
            place[key] = junk(rng)
        break
    return copy


def text_of(rng: random.Random, value: dict) -> bytes:
    """As bytes, now and then cut short, doubled or with a byte changed."""
    data = bytearray(json.dumps(spoiled(rng, value) if rng.random() < 0.6 else junk(rng)).encode())
    kind = rng.random()
    if kind < 0.2:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind < 0.4 and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind < 0.45:
        data = bytearray(b"[" * rng.randrange(60_000))
    elif kind < 0.6:
        data = bytearray(rng.randbytes(rng.randrange(300)))
    return bytes(data)


def frame_of(rng: random.Random, whole: bytes) -> bytes:
    """A binary message: of no kind, too short, with a damaged picture, or from beyond the end of time."""
    kind = rng.random()
    if kind < 0.3:
        return rng.randbytes(rng.randrange(9))
    if kind < 0.7:
        return bytes([rng.choice([0, 4, 5, 77, 255])]) + rng.randbytes(8 + rng.randrange(40))
    head = bytes([rng.choice([1, 1, 1, 3])]) + struct.pack("!Q", rng.choice([0, 1, 2**63, 2**64 - 1, rng.getrandbits(40)]))
    return head + (whole[: rng.randrange(60)] + rng.randbytes(rng.randrange(60)) if rng.random() < 0.8 else b"")


async def talk_nonsense(url: str, seed: int, texts: int, frames: int) -> int:
    """So many messages over as many connections as they take; gives how many were sent. Only what WebSockets forbid is left out."""
    rng, whole, sent = random.Random(seed), picture(seed), 0
    left = ["text"] * texts + ["binary"] * frames
    rng.shuffle(left)
    while left:
        try:
            async with connect(f"{url.replace('http', 'ws', 1)}/v1/realtime?clock=file", max_size=None, close_timeout=30) as ws:

                async def listen(ws=ws) -> None:
                    async for _ in ws:
                        pass

                listening = asyncio.create_task(listen())
                try:
                    while left:
                        if left[-1] == "text":
                            await ws.send(text_of(rng, rng.choice(EVENTS)).decode("utf-8", "replace"))
                        else:
                            await ws.send(frame_of(rng, whole))
                        left.pop()
                        sent += 1
                        if sent % 10 == 0:
                            await asyncio.sleep(0)
                finally:
                    listening.cancel()
                    await asyncio.gather(listening, return_exceptions=True)
        except websockets.ConnectionClosed as closed:  # too many mistakes, too fast, no place: all with a word
            assert closed.rcvd is not None and closed.rcvd.code in (1000, 1008, 1009, 1013), closed
            if closed.rcvd.code == 1013:
                await asyncio.sleep(0.02)
    return sent


class Raw:
    """HTTP as bytes: what a well-behaved client cannot send."""

    def __init__(self, url: str):
        self.address = httpx.URL(url)

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(self.address.host, self.address.port)

    async def ask(self, data: bytes) -> tuple[int, dict]:
        """The answer's status (0: the connection was closed without one) and JSON; opens the connection again where it was closed."""
        try:
            self.writer.write(data)
            await self.writer.drain()
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            await self.open()
            return 0, {}
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        body = await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
        if fields.get(b"connection") == b"close":
            self.writer.close()
            await self.open()
        return int(head.split()[1]), json.loads(body) if fields.get(b"content-type", b"").startswith(b"application/json") else {}

    def post(self, path: str, body: bytes) -> bytes:
        return f"POST {path} HTTP/1.1\r\nHost: {self.address.host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def send_nonsense(url: str, seed: int, count: int, victim: str) -> dict[int, int]:
    """How often each status was the answer."""
    rng, raw, seen = random.Random(seed), Raw(url), {}
    await raw.open()
    for _ in range(count):
        path, value = rng.choice(list(BODIES.items()))
        words = {"id": victim, "n": rng.choice(["-1", "1e999", "nan", "7", ""]), "word": "".join(rng.choices(string.ascii_letters, k=5))}
        data = raw.post(path.format(**words), text_of(rng, value))
        if rng.random() < 0.03:  # no HTTP at all
            data = rng.randbytes(20).replace(b"\n", b"") + b"\r\n\r\n"
        status, answer = await raw.ask(data)
        seen[status] = seen.get(status, 0) + 1
        if status == 201:  # it was right after all
            await raw.ask(f"DELETE /v1/streams/{answer['id']} HTTP/1.1\r\nHost: {raw.address.host}\r\n\r\n".encode())
    raw.writer.close()
    return seen


def test_malformed_messages(server):
    victim = server.open(source="push", clock="file")
    with Witness(server):

        async def all_at_once() -> list:
            half = MESSAGES["http"] // 2
            return await asyncio.gather(
                talk_nonsense(server.url, 1, MESSAGES["text"], MESSAGES["binary"]),
                send_nonsense(server.url, 2, half, victim),
                send_nonsense(server.url, 3, half, victim),
            )

        sent, *answers = asyncio.run(all_at_once())
    server.http.delete(f"/v1/streams/{victim}")
    assert sent + sum(sum(seen.values()) for seen in answers) == sum(MESSAGES.values()) == COUNT
    statuses = set().union(*answers)
    assert {400, 404} <= statuses <= {0, 200, 201, 202, 400, 403, 404, 405, 409, 413, 429, 503}, answers


@pytest.mark.parametrize("kind", ["websocket", "http"])
def test_a_client_that_vanishes_in_the_middle_of_a_frame(server, kind):
    address = httpx.URL(server.url)
    with Witness(server) as witness:
        with socket.create_connection((address.host, address.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves without a word
            if kind == "websocket":
                client.sendall(
                    b"GET /v1/realtime?name=vanished&clock=file&seed=5 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                )
                assert b"101" in client.recv(100)
                started = server.wait_for("stream.started", name="vanished")
                for index in range(5):
                    message = bytes([1]) + (500_000 * index).to_bytes(8, "big") + picture(index)
                    client.sendall(masked(len(message)) + message)
                wait_for_rounds(server, started["stream"], 2)
                client.sendall(masked(100_000) + bytes(50_000))  # half a message
            else:
                started = {"stream": server.open(source="push", clock="file", name="vanished")}
                path = f"/v1/streams/{started['stream']}/frames"
                client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n".encode() + bytes(50_000))
        if kind == "websocket":
            id = started["stream"]
            assert server.wait_for("stream.ended", stream=id)["reason"] == "left"
            assert list(server.events(id))[-1][2]["resume"] == id
            assert server.open(resume=id) == id  # nothing that was told is lost, and what comes now is as if nothing had happened
            for index in (4, 5):
                server.push(id, picture(index))
            server.push(id, last=1)
            assert server.captions(id) == witness.alone[:3]
        else:
            assert server.status(started["stream"])["state"] == "running"
            server.http.delete(f"/v1/streams/{started['stream']}")


def wait_for_rounds(server: Server, id: str, count: int) -> None:
    """By the file's clock a round is made once a frame after its last sample is there."""
    end = time.monotonic() + 90
    while server.status(id)["rounds"] < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def masked(size: int) -> bytes:
    """The head of a binary WebSocket message from a client, under a mask that changes nothing."""
    return bytes([0x82, 0xFF]) + size.to_bytes(8, "big") + bytes(4)


# Clocks and disks


def test_a_wall_clock_that_jumps(server, wall_clock):
    """By hours, forward and back, under a live stream that is kept and resumed meanwhile: its own time goes on, and nothing is refused."""
    id = server.open(source="push", name="camera")

    def send(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert server.push(id, picture(0)).status_code == 202
            time.sleep(0.1)

    with Witness(server):
        began = time.monotonic()
        send(1.2)
        for hours in (5, -9, 0):
            wall_clock.set(hours)
            send(1.2)
            assert server.http.post(f"/v1/streams/{id}/snapshot").status_code == 201
            server.http.delete(f"/v1/streams/{id}")
            wall_clock.set(-hours)
            assert server.open(resume=id) == id
        send(1.2)
        status = server.http.delete(f"/v1/streams/{id}").json()
        took = time.monotonic() - began
    assert 4 <= status["position"] <= took + 2 and status["rounds"] >= 4  # by the clock of all deadlines
    told = [data for _, _, data in server.events(id) if data["type"] in ("segment", "silence", "gap")]
    assert all(before["end"] == after["start"] for before, after in itertools.pairwise(told))
    assert {data["reason"] for data in told if data["type"] == "gap"} <= {"late", "busy", "moved"}
    stamps = [calendar.timegm(time.strptime(line["time"], "%Y-%m-%dT%H:%M:%SZ")) for line in server.lines]
    assert max(stamps) - min(stamps) > 13 * 3600  # it did jump


def test_a_disk_that_fills_up_and_is_emptied(server, state):
    """Full for real, by a limit on the size of the files that the server writes: the stream goes on, and its last snapshot stays."""
    limit = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    with Witness(server) as witness:
        id = server.open(source="push", clock="file", seed=5)
        for index in range(5):
            server.push(id, picture(index))
        wait_for_rounds(server, id, 2)
        assert server.http.post(f"/v1/streams/{id}/snapshot").status_code == 201
        kept = (state / f"{id}.svlm").read_bytes()
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            server.push(id, picture(5))
            server.push(id, picture(6))
            wait_for_rounds(server, id, 3)
            answer = server.http.post(f"/v1/streams/{id}/snapshot")
            assert answer.status_code == 507 and "File too large" in answer.json()["error"]["message"]
        finally:
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
        assert (state / f"{id}.svlm").read_bytes() == kept and not list(state.glob(".*"))
        assert server.http.post(f"/v1/streams/{id}/snapshot").status_code == 201
        server.http.delete(f"/v1/streams/{id}")
        assert server.captions(id) == witness.alone[:3]
    assert 'svlm_snapshots_total{result="failed"} 1.0' in server.http.get("/metrics").text


# Media


def sound(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


def damaged(folder: Path) -> dict[str, Path]:
    """Files that are wrong in the container, the codec or the numbers that they claim."""
    whole, rng = sample_path().read_bytes(), random.Random(4)
    box = whole.index(b"moov") - 4

    def patched(*changes: tuple[int, bytes]) -> bytes:
        data = bytearray(whole)
        for at, new in changes:
            data[at : at + len(new)] = new
        return bytes(data)

    def noisy(first: int, stop: int, count: int) -> bytes:
        return patched(*((rng.randrange(first, stop), rng.randbytes(1)) for _ in range(count)))

    codec, first = whole.index(b"avc1", whole.index(b"stsd")), whole.index(b"mdat") + 4
    contents = {
        "half.mp4": whole[: len(whole) // 2],
        "no-end.mp4": whole[:-9],
        "header-noise.mp4": noisy(box, box + 600, 60),
        "picture-noise.mp4": noisy(first, len(whole), 4000),
        "endless-box.mp4": patched((box, b"\xff\xff\xff\xff")),
        "wide.mp4": patched((codec + 28, b"\xff\xff\xff\xff")),
        "many-samples.mp4": patched((whole.index(b"stsz") + 12, b"\x7f\xff\xff\xff")),
        "no-time.mp4": patched((whole.index(b"mdhd") + 16, bytes(4))),
        "random.mkv": b"\x1aE\xdf\xa3" + rng.randbytes(4000),
        "random.ts": bytes([0x47]).join(rng.randbytes(187) for _ in range(40)),
        "random.h264": b"\0\0\0\1\x67" + rng.randbytes(3000),
        "loop.m3u8": b"#EXTM3U\n#EXTINF:1,\nloop.m3u8\n",
        "program.mp4": b"#!/bin/sh\nexit 1\n",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    sound(folder / "sound.wav")
    return {name: folder / name for name in (*contents, "sound.wav")}


def test_malformed_media(server, folder):
    files = damaged(folder)
    with Witness(server):
        waiting, running = list(files), []
        while waiting or running:
            if waiting and len(running) < 2:
                running.append((name := waiting.pop(), server.open(source=str(files[name]), name=name, duration=20)))
            for name, id in running:
                if server.status(id)["state"] == "ended":
                    running.remove((name, id))
                    break
            threading.Event().wait(0.05)
    ends = {line["name"]: None for line in server.lines if line["event"] == "stream.started" and line["name"] in files}
    names = {line["stream"]: line["name"] for line in server.lines if line["event"] == "stream.started"}
    ends |= {names[line["stream"]]: line for line in server.lines if line["event"] == "stream.ended" and names[line["stream"]] in files}
    assert ends.keys() == files.keys()
    for line in ends.values():
        assert line["reason"] in ("error", "finished") and (line["reason"] == "finished" or line["message"]), line
        assert "\n" not in line["message"] and "Traceback" not in line["message"]
    for name in ("random.mkv", "random.ts", "random.h264", "loop.m3u8", "program.mp4", "sound.wav"):
        assert ends[name]["reason"] == "error" and ends[name]["rounds"] == 0, ends[name]
