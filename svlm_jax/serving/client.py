"""A client of a server, in plain Python: start a stream, read its words as they come, ask, end it. Needs nothing that is not here already."""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from svlm_jax.errors import UserError

Json = dict[str, Any]
PAUSES = (1.0, 2.0, 5.0)  # seconds before each further attempt at a server that has gone away
SILENCE = 60.0  # seconds; a server says something, if only a comment, more often


class Client:
    """Calls to one server. Raises UserError, with the server's own words, for what it refuses and where it cannot be reached.

    Args:
      url: of the server, such as http://127.0.0.1:8000.
      key: what the server's operator gave out, if it asks for one.
    """

    def __init__(self, url: str, key: str = ""):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{url} is not the address of a server: it looks like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def start(self, source: str = "sample", **wish: Any) -> str:
        """A new stream's name. `wish` is what `POST /v1/streams` takes: clock, pace, start, duration, query, previous_text, seed, name."""
        return self._json("POST", "/v1/streams", {"source": source, **wish})["id"]

    def resume(self, id: str) -> str:
        """Goes on with a stream that the server has kept."""
        return self._json("POST", "/v1/streams", {"resume": id})["id"]

    def status(self, id: str) -> Json:
        """Where the stream is, and how it is doing."""
        return self._json("GET", f"/v1/streams/{_quoted(id)}")

    def push(self, id: str, picture: bytes = b"", *, seconds: float | None = None, last: bool = False) -> Json:
        """A JPEG, PNG or WebP into a stream of source "push"; `seconds` is its time, `last` says that no more will come."""
        query = {"t": seconds} if seconds is not None else {}
        return self._json("POST", f"/v1/streams/{_quoted(id)}/frames?{urllib.parse.urlencode({**query, 'last': int(last)})}", picture)

    def ask(self, id: str, text: str) -> None:
        """A question for the next round."""
        self._json("POST", f"/v1/streams/{_quoted(id)}/questions", {"text": text})

    def end(self, id: str) -> None:
        self._json("DELETE", f"/v1/streams/{_quoted(id)}")

    def events(self, id: str, last: int = 0) -> Iterator[Json]:
        """All that the stream tells behind event number `last`, as it comes: segments, silences, gaps, questions, states, and its end.

        A connection that breaks is made again, and nothing is told twice. UserError where the server does not come back.
        """
        failures = 0
        while True:
            try:
                with self._open("GET", f"/v1/streams/{_quoted(id)}/captions", headers={"Last-Event-ID": str(last)} if last else {}) as answer:
                    for number, data in _parsed(answer):
                        last, failures = number or last, 0
                        yield data
                        if data.get("type") == "end":
                            return
            except (OSError, http.client.HTTPException) as error:
                if failures == len(PAUSES):
                    raise UserError(f"{self.url} went away ({error or type(error).__name__}): start it again, and go on with stream {id}") from None
            if failures == len(PAUSES):
                raise UserError(f"{self.url} ends every answer at once: is it what it should be?")
            time.sleep(PAUSES[failures])
            failures += 1

    def _open(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", body, {**self._headers, **(headers or {})}, method=method)
        try:
            return urllib.request.urlopen(request, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            with error:
                told = error.read()
            try:
                message = json.loads(told)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"{error.code} {error.reason}: it is no server of this kind"
            raise UserError(f"{self.url} refuses: {message}") from None

    def _json(self, method: str, path: str, body: Json | bytes | None = None) -> Json:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": "application/json" if isinstance(body, dict) else "application/octet-stream"} if body is not None else {}
        try:
            with self._open(method, path, data, headers) as answer:
                return json.load(answer)
        except ValueError:
            raise UserError(f"{self.url} does not answer in JSON: it is no server of this kind") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise UserError(f"{self.url} cannot be reached ({reason}): is the server running?") from None


def _quoted(id: str) -> str:
    return urllib.parse.quote(id, safe="")


def _parsed(lines: Any) -> Iterator[tuple[int, Json]]:
    """(number, data) of every server-sent event; 0 where an event has no number."""
    number, data = 0, ""
    for raw in lines:
        field, _, value = raw.decode("utf-8").rstrip("\r\n").partition(": ")
        if field == "id":
            number = int(value)
        elif field == "data":
            data += value
        elif not field and data:
            yield number, json.loads(data)
            number, data = 0, ""
