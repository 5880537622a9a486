"""A server as a person starts it, for tests: a process on a free port, small and quick."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from svlm_jax.demo.make_tiny import tiny_path

ROOT = Path(__file__).parent.parent
SMALL = ["--size", "112x84", "--max-pixels", "9408", "--vision-window", "4", "--text-window", "4", "--max-new-tokens", "6"]


class Server:
    """`lines` are its log, JSON objects."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None):
        inherited = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}  # a server keeps deadlines
        command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--model", str(tiny_path()), *SMALL, *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**inherited, **(env or {})}, start_new_session=True
        )
        self.lines: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._readers = [threading.Thread(target=work, daemon=True) for work in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()
        self.url = str(self.wait_for("server.listening")["url"]).rstrip("/")
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def _read_errors(self) -> None:
        self.errors += list(self.process.stderr)

    def wait_for(self, event: str, seconds: float = 120, **fields: Any) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                    return line
            assert self.process.poll() is None or self._readers[0].is_alive(), f"the server ended: {''.join(self.errors)}"
            time.sleep(0.02)
        raise AssertionError(f"no {event} in {seconds} s: {self.lines[-3:]} {''.join(self.errors)[-500:]}")

    def ready(self) -> "Server":
        self.wait_for("server.ready")
        return self

    def open(self, **wish: Any) -> str:
        """A new stream's name. On a machine that is busy with other things, live ones are admitted when it has calmed down."""
        end = time.monotonic() + 90
        while True:
            answer = self.http.post("/v1/streams", json=wish)
            if answer.status_code != 503 or "a round takes" not in answer.text or time.monotonic() > end:
                assert answer.status_code == 201, answer.text
                return answer.json()["id"]
            time.sleep(1)

    def calm(self) -> None:
        """Waits until a live stream is admitted."""
        self.http.delete(f"/v1/streams/{self.open(source='push')}")

    def status(self, id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/streams/{id}").json()

    def push(self, id: str, picture: bytes = b"", **query: Any) -> httpx.Response:
        return self.http.post(f"/v1/streams/{id}/frames", params=query, content=picture)

    def events(self, id: str, last: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(number, name, data) of each server-sent event."""
        headers = {"Last-Event-ID": str(last)} if last else {}
        with self.http.stream("GET", f"/v1/streams/{id}/captions", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            number, name = 0, "message"
            for line in answer.iter_lines():
                field, _, value = line.partition(": ")
                if field == "id":
                    number = int(value)
                elif field == "event":
                    name = value
                elif field == "data":
                    yield number, name, json.loads(value)
                elif not line:
                    name = "message"

    def captions(self, id: str) -> list[dict[str, Any]]:
        """All of a stream's, once it has ended."""
        return [data for _, name, data in self.events(id) if name == "message"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.http.close()
        for reader in self._readers:
            reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def picture(seed: int, height: int = 84, width: int = 112, form: str = "PNG") -> bytes:
    """Noise, the same for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()
