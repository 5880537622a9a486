"""Any server that speaks OpenAI's chat completions, over the standard library, with patience for its failures.

The API key is taken from the environment, OPENAI_API_KEY, and is never written anywhere.
"""

import contextlib
import dataclasses
import email.utils
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

from svlm_jax.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; each failure of a request in a row doubles the wait
LONGEST_ASKED = 900.0  # seconds that a Retry-After is obeyed for, at most
SAID = 300  # characters of a server's message that are passed on
Message = dict[str, Any]


class Reply(NamedTuple):
    """A whole answer."""

    text: str
    refused: bool  # the server says that the model would not, or was not allowed to
    prompt_tokens: int
    answer_tokens: int


class Failure(Exception):
    """One attempt that came to nothing and may be made again. `kind` is told in reports: timeout, 429, 500, broken JSON, connection."""

    def __init__(self, kind: str, details: str = "", wait: float | None = None):
        super().__init__(f"{kind}: {details}" if details else kind)
        self.kind, self.wait = kind, wait


class Stopped(Exception):
    """Another request has ended the run."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently."""

    url: str  # such as https://api.openai.com/v1
    model: str
    timeout: float = 120.0  # seconds without a byte
    tries: int = 8  # attempts a request before the run ends
    first_wait: float = FIRST_WAIT

    @property
    def name(self) -> str:
        return self.model


def parse_endpoint(text: str, **settings: Any) -> Endpoint:
    """URL#MODEL. Raises UserError for anything else."""
    url, _, model = text.partition("#")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not model:
        raise UserError(f"{text!r} is no endpoint: give URL#MODEL, such as https://api.openai.com/v1#gpt-5")
    return Endpoint(url.rstrip("/").removesuffix("/chat/completions"), model, **settings)


def ask(endpoint: Endpoint, messages: list[Message], temperature: float | None) -> Reply:
    """One attempt. Raises Failure for what may pass, UserError for what will not."""
    body: dict[str, Any] = {"model": endpoint.model, "messages": messages}
    if temperature is not None:
        body["temperature"] = temperature
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "svlm-jax"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=endpoint.timeout) as response:
            data = response.read()
    except urllib.error.HTTPError as error:
        raise _http_failure(endpoint, error) from None
    except TimeoutError as error:
        raise Failure("timeout", str(error)) from None
    except urllib.error.URLError as error:
        kind = "timeout" if isinstance(error.reason, TimeoutError) else "connection"
        raise Failure(kind, str(error.reason)) from None
    except http.client.IncompleteRead:
        raise Failure("broken JSON", "the answer broke off") from None
    except (http.client.HTTPException, OSError) as error:
        raise Failure("connection", str(error) or type(error).__name__) from None
    return _read(data)


def _http_failure(endpoint: Endpoint, error: urllib.error.HTTPError) -> Exception:
    said = ""
    with contextlib.suppress(OSError, http.client.HTTPException):
        said = error.read(10_000).decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):  # else the body as it came
        said = str(json.loads(said)["error"]["message"])
    said = " ".join(said.split())[:SAID]
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        return Failure(str(error.code), said, _retry_after(error.headers.get("Retry-After")))
    if error.code == 400 and "temperature" in said.lower():
        return NoTemperature(said)
    hint = "set OPENAI_API_KEY to a valid key" if error.code in (401, 403) else "check the URL and the model's name"
    return UserError(f"{endpoint.url} answers {error.code} for {endpoint.model} ({said or error.reason}): {hint}")


class NoTemperature(UserError):
    """The model takes no temperature."""


def _retry_after(value: str | None) -> float | None:
    """Seconds; the header holds them, or a date."""
    if not value:
        return None
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(0.0, wait), LONGEST_ASKED) if wait == wait else None


def _read(data: bytes) -> Reply:
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        usage = answer.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Failure("broken JSON", f"{type(error).__name__} in {data[:60]!r}") from None
    if isinstance(text, list):  # content in parts
        text = "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in text if isinstance(part, str | dict))
    finish = choice.get("finish_reason")
    refused = bool(refusal) or finish == "content_filter"
    return Reply(str(text or refusal or ""), refused, *tokens)


class Line:
    """Requests to one endpoint by many threads: waits longer after each failure, and forgets the temperature where none is taken."""

    def __init__(self, endpoint: Endpoint, temperature: float | None = 0.0):
        self.endpoint, self.temperature, self.stop = endpoint, temperature, threading.Event()

    def request(self, messages: list[Message], failed: Callable[[Failure], None] = lambda failure: None) -> Reply:
        """The answer, after as many attempts as it takes. `failed` hears of each that failed.

        Raises UserError when the attempts are used up, or for a failure that none could mend; Stopped when `stop` is set.
        """
        for attempt in range(self.endpoint.tries):
            if self.stop.is_set():
                raise Stopped
            temperature = self.temperature
            try:
                return ask(self.endpoint, messages, temperature)
            except NoTemperature:
                if temperature is None:
                    raise
                self.temperature = None
                return self.request(messages, failed)
            except Failure as failure:
                failed(failure)
                wait = max(min(self.endpoint.first_wait * 2**attempt, LONGEST_WAIT), failure.wait or 0.0)
                if attempt + 1 == self.endpoint.tries:
                    told = f"{self.endpoint.url} failed {self.endpoint.tries} times in a row, the last time with {failure}"
                    raise UserError(f"{told}; what was done is kept: start again to go on") from None
            if self.stop.wait(wait):
                raise Stopped
        raise AssertionError("an endpoint is tried at least once")
