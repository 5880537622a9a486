"""What stands before every route: API keys, foreign web pages, and bodies that are too large or never end."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import urllib.parse
from collections.abc import Sequence
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from svlm_jax.errors import UserError
from svlm_jax.serving.limits import Refused, TooLarge
from svlm_jax.serving.metrics import Metrics

OPEN = ("/health", "/ready")  # and the page's files, which hold nothing: whatever they show they ask for with a key
GUARDED = ("/v1/", "/metrics")
KEY_PROTOCOL = "openai-insecure-api-key."  # of a WebSocket's subprotocols, which is all that browsers can set


def refusal(error: UserError, status: int = 400) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = getattr(error, "kind", "invalid_request_error")
    status = getattr(error, "status", status)
    retry = getattr(error, "retry_after", None)
    headers = {"Retry-After": str(retry)} if retry is not None else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": {"message": str(error), "type": kind, "param": None, "code": None}}, status, headers)


def key_of(connection: HTTPConnection) -> str:
    """The API key that a request comes with, '' for none."""
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    offered = [part.strip() for part in connection.headers.get("sec-websocket-protocol", "").split(",")]
    return next((part.removeprefix(KEY_PROTOCOL) for part in offered if part.startswith(KEY_PROTOCOL)), "")


class Guard:
    """ASGI middleware. Puts `owner` into the connection's state: '' without keys, else a digest of the key."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], metrics: Metrics, host: str):
        self.app, self._keys, self._metrics, self._host = app, [key.encode() for key in keys], metrics, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        scope.setdefault("state", {})["owner"] = ""
        try:
            self._check(connection, scope)
        except Refused as error:
            await self._refuse(error, scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)

    def _check(self, connection: HTTPConnection, scope: Scope) -> None:
        path, host = connection.url.path, connection.headers.get("host", "")
        origin = connection.headers.get("origin")
        if origin is not None and urllib.parse.urlsplit(origin).netloc.lower() != host.lower():
            raise Refused("a page of another site may not call this server", status=403)
        if not path.startswith(GUARDED):
            return
        if not self._keys:
            if not self._is_own_name(host):  # a foreign page whose name was made to lead here
                raise Refused(f"this server does not answer to the name {host[:80]}: set an --api-key, or call it by its address", status=403)
            return
        key = key_of(connection).encode()
        # All of them, so that the time tells nothing
        if not sum(hmac.compare_digest(key, known) for known in self._keys):
            raise Refused("an API key is needed: send it as Authorization: Bearer KEY", status=401, close=1008)
        scope["state"]["owner"] = hashlib.sha256(key).hexdigest()[:16]

    def _is_own_name(self, host: str) -> bool:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        if name in ("", "localhost", self._host):
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _refuse(self, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.requests.labels(str(error.status)).inc()
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            await socket.accept()  # only an open socket can be closed with a code
            await socket.close(error.close, str(error)[:120])
            return
        await refusal(error)(scope, receive, send)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The request's body. Refused where it is larger than `most` bytes, or does not come within that time."""
    stated = request.headers.get("content-length", "0")
    if stated.isdigit() and int(stated) > most:
        raise TooLarge(f"{int(stated):,} bytes are too many: {most:,} are the most")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise TooLarge(f"the body is too large: {most:,} bytes are the most")
    except TimeoutError:
        raise Refused(f"the body did not come within {seconds:g} s", status=408) from None
    return bytes(body)


async def read_json(request: Request, most: int, seconds: float) -> dict[str, Any]:
    """The request's body, a JSON object; an empty one for none."""
    body = await read_body(request, most, seconds)
    return parse_json(body) if body.strip() else {}


def parse_json(text: bytes | str) -> dict[str, Any]:
    """A JSON object. Refused for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("this is not JSON") from None
    if not isinstance(value, dict):
        raise Refused("a JSON object is expected")
    return value
