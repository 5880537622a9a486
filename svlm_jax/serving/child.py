"""The parent's side of a decoding process."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svlm_jax.errors import UserError
from svlm_jax.serving.decoder import LENGTH, MESSAGE

PASSED_ON = ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "LD_LIBRARY_PATH", "SYSTEMROOT")  # no keys, no proxies
LARGEST = 1 << 30  # bytes of a message; more is a decoder that has gone wrong
START_SECONDS = 60.0  # that a decoder may take until it is there


class Decoder:
    """One process at one job; see `svlm_jax.serving.decoder`. Closing it kills it, whatever it is at."""

    def __init__(self, **job: Any):
        root = str(Path(__file__).resolve().parents[2])
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "svlm_jax.serving.decoder", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the server, which ends its streams in order
        )
        self._lock = threading.Lock()
        self._up = False  # whether a decoder of pictures has said that it is there

    def messages(self) -> Iterator[tuple[bytes, bytes]]:
        """What it sends, until its end: (kind, payload). UserError where it died."""
        while True:
            kind, payload = self._read()
            if kind == b"D":
                return
            yield kind, payload
            if kind == b"E":
                return

    def send(self, data: bytes) -> None:
        """A picture, or an offer, with its length before it. OSError or ValueError where the process is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(LENGTH.pack(len(data)))
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def leave(self, seconds: float) -> None:
        """Closes its input, for it to end by itself, and kills it after that time."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        timer = threading.Timer(seconds, self.close)
        timer.daemon = True
        timer.start()

    def picture(self, data: bytes, seconds: float) -> bytes:
        """The pixels of one picture. UserError for one that cannot be read, or not in that time; the process may be dead then."""
        if not self._up:  # how long a process takes to start says nothing of the picture
            with self._within(START_SECONDS):
                self._read()
            self._up = True
        try:
            with self._within(seconds):
                self.send(data)
                kind, payload = self._read()
        except (BrokenPipeError, ValueError):
            raise UserError("a picture could not be decoded: its decoder ended") from None
        if kind == b"E":
            raise UserError(payload.decode())
        return payload

    @contextlib.contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Kills the process after that time."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _read(self) -> tuple[bytes, bytes]:
        assert self._process.stdout is not None
        try:
            kind, size = MESSAGE.unpack(self._exactly(MESSAGE.size))
            if kind not in (b"I", b"R", b"F", b"E", b"D") or size > LARGEST:
                raise struct.error
            return kind, self._exactly(size)
        except (struct.error, ValueError, OSError):
            try:
                code = self._process.wait(1.0)  # its pipe closes a moment before it is gone
            except subprocess.TimeoutExpired:
                code = None
            how = f" by signal {-code}" if code is not None and code < 0 else ""
            raise UserError(f"the decoder was ended{how}: the video is damaged, too large, or took too long") from None

    def _exactly(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise struct.error
        return data

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(5)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what it had not read yet
                        pipe.close()
