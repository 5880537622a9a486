"""What a client may ask of the server, and the errors that say so."""

import dataclasses
import time
from collections.abc import Callable

from svlm_jax.errors import UserError

MIB = 1 << 20
RETRY = 5  # seconds after which a client may ask again that was too fast or found no room


class Refused(UserError):
    """A request that is not carried out: the HTTP status and the WebSocket close code that go with the message."""

    def __init__(self, message: str, *, status: int = 400, close: int = 1008, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.close, self.kind = status, close, kind

    @property
    def retry_after(self) -> int | None:
        """Seconds to wait before the same request may be granted; None where waiting does not help."""
        return RETRY if self.status in (429, 503) else None


class Full(Refused):
    """There is no room for the stream; another time there may be."""

    def __init__(self, message: str):
        super().__init__(message, status=503, close=1013, kind="overloaded_error")


class TooLarge(Refused):
    def __init__(self, message: str):
        super().__init__(message, status=413, close=1009)


class TooFast(Refused):
    def __init__(self, message: str):
        super().__init__(message, status=429, close=1008, kind="rate_limit_error")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    streams_per_key: int = 64  # that one API key may have open at once
    frame_bytes: int = 4 * MIB  # of one pushed picture
    frame_pixels: int = 4096 * 4096  # of one picture, before it is decoded
    frames_per_second: float = 60.0  # pushed into one stream, on average over some seconds
    json_bytes: int = 256 * 1024  # of a request's body
    chat_bytes: int = 32 * MIB  # of a chat request's body, pictures and clips included
    chat_frames: int = 64  # of all pictures and clips of one chat request
    chat_waiting: int = 8  # chat requests that wait for the one being answered
    text_characters: int = 4000  # of a query or question
    previous_text_characters: int = 20_000
    questions_waiting: int = 4  # of one stream
    history: int = 20_000  # events of one stream that can be read again
    ended_streams: int = 64  # that are kept for reading
    kept_snapshots: int = 256  # in the server's folder; the oldest goes first
    listeners: int = 64  # of one stream
    idle_seconds: float = 120.0  # without a frame, after which a pushed stream ends
    body_seconds: float = 20.0  # to send a request's body
    send_seconds: float = 20.0  # for a listener to take what it was sent
    decode_seconds: float = 5.0  # for one picture
    stall_seconds: float = 30.0  # without a picture from a file or URL
    decoder_bytes: int = 4096 * MIB  # address space of a process that decodes


class Rate:
    """A token bucket: so many a second on average, and those of four seconds at once."""

    def __init__(self, per_second: float, now: Callable[[], float] = time.monotonic):
        self._rate, self._now = per_second, now
        self._room, self._at = 4 * per_second, now()

    def take(self) -> bool:
        moment = self._now()
        self._room = min(4 * self._rate, self._room + (moment - self._at) * self._rate)
        self._at = moment
        if self._room < 1:
            return False
        self._room -= 1
        return True
