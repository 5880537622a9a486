"""The client and `svlm watch`, before a server that breaks off in the middle, refuses, and goes away."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

import pytest
import webvtt

from svlm_jax import cli
from svlm_jax.errors import UserError
from svlm_jax.serving import client as client_module
from svlm_jax.serving.client import Client

EVENTS = [
    {"type": "segment", "start": 0.0, "end": 1.0, "text": "red passes"},
    {"type": "silence", "start": 1.0, "end": 2.0},
    {"type": "question", "start": 2.0, "text": "Who has the ball?"},
    {"type": "segment", "start": 2.0, "end": 3.0, "text": "blue"},
    {"type": "gap", "start": 3.0, "end": 5.0, "reason": "late"},
    {"type": "end", "reason": "finished", "message": ""},
]


class Stub(http.server.BaseHTTPRequestHandler):
    """One stream, `strm_1`, whose events are told two a connection; wants the key "secret"."""

    asked: list[tuple[str, str, dict]]
    events = EVENTS

    def log_message(self, *_):
        pass

    def _answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path, json.loads(body) if body.startswith(b"{") else {"bytes": len(body)}))
        if self.headers.get("Authorization") != "Bearer secret":
            self._answer(401, {"error": {"message": "an API key is needed"}})
        elif self.path.endswith("/captions"):
            last = int(self.headers.get("Last-Event-ID", 0))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"retry: 2000\n\n:\n\n")
            for number, event in list(enumerate(self.events, 1))[last : last + 2]:
                self.wfile.write(f"id: {number}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"id: 99\ndata: {")  # and breaks off
        else:
            self._answer(201, {"id": "strm_1"})

    do_GET = do_POST = do_DELETE = _any


@contextlib.contextmanager
def serving(**more) -> Iterator[tuple[str, list[tuple[str, str, dict]]]]:
    asked: list[tuple[str, str, dict]] = []
    handler = type("Handler", (Stub,), {"asked": asked, **more})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(client_module, "PAUSES", (0.01, 0.01, 0.01))


def test_every_event_is_told_once_over_connections_that_break():
    with serving() as (url, asked):
        client = Client(url + "/", "secret")
        id = client.start("sample", pace="real")
        client.ask(id, "Who has the ball?")
        client.push(id, b"\xff\xd8", seconds=1.5, last=True)
        assert list(client.events(id)) == EVENTS
        assert list(client.events(id, last=4)) == EVENTS[4:]
        client.end(id)
    assert asked[:3] == [
        ("POST", "/v1/streams", {"source": "sample", "pace": "real"}),
        ("POST", "/v1/streams/strm_1/questions", {"text": "Who has the ball?"}),
        ("POST", "/v1/streams/strm_1/frames?t=1.5&last=1", {"bytes": 2}),
    ]
    assert asked[-1][:2] == ("DELETE", "/v1/streams/strm_1")


def test_what_a_server_refuses_is_told_in_its_words():
    with serving() as (url, _), pytest.raises(UserError, match=r"refuses: an API key is needed"):
        Client(url).start()
    with pytest.raises(UserError, match=r"cannot be reached .*: is the server running\?"):
        Client(url).start()
    with pytest.raises(UserError, match=r"went away .*: start it again, and go on with stream strm_1"):
        list(Client(url, "secret").events("strm_1"))
    with pytest.raises(UserError, match="is not the address of a server"):
        Client("localhost:8000")


def test_watching_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SVLM_API_KEY", "secret")
    out = tmp_path / "said.vtt"
    with serving() as (url, asked):
        assert cli.run(["watch", url, "--query", "Look.", "--ask", "Who has the ball?", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "00:00:00 red passes",
        "00:00:02 (asked: Who has the ball?)",
        "00:00:02 blue",
        "00:00:03 (2 s were skipped: late)",
        "(the end: finished)",
    ]
    assert [cue.text for cue in webvtt.read(str(out))] == ["red passes", "blue"]
    assert asked[0][2] == {"source": "sample", "pace": "real", "query": "Look."}
    assert "DELETE" not in [method for method, *_ in asked]


def test_a_stream_that_fails_and_one_that_is_left(capsys, monkeypatch):
    monkeypatch.setenv("SVLM_API_KEY", "secret")
    failed = [{"type": "end", "reason": "error", "message": "the video is damaged"}]
    with serving(events=failed) as (url, _):
        assert cli.run(["watch", url, "--stream", "strm_1"]) == 1
    assert "stream strm_1 failed: the video is damaged" in capsys.readouterr().err
    with serving() as (url, asked):
        monkeypatch.setattr(Client, "events", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.run(["watch", url]) == 130
        assert asked[-1][:2] == ("DELETE", "/v1/streams/strm_1")  # it had started it
        before = len(asked)
        assert cli.run(["watch", url, "--stream", "strm_1"]) == 130
        assert len(asked) == before
    assert cli.run(["watch", url, "--stream", "strm_1", "--source", "sample"]) == 2
