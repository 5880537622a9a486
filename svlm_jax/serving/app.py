"""The routes. What they do stands elsewhere: here a request becomes a call, and what comes of it an answer."""

import asyncio
import contextlib
import functools
import io
import math
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from svlm_jax.captions import Caption, document
from svlm_jax.demo.bundle import clip_path
from svlm_jax.errors import UserError
from svlm_jax.serving.chat import Chat
from svlm_jax.serving.events import Event
from svlm_jax.serving.guard import Guard, read_body, read_json, refusal
from svlm_jax.serving.limits import Refused
from svlm_jax.serving.pushing import push, pushable
from svlm_jax.serving.realtime import Realtime
from svlm_jax.serving.service import Service
from svlm_jax.serving.sessions import Session, log
from svlm_jax.serving.sse import EventStream
from svlm_jax.serving.whip import Whip

PAGE = Path(__file__).parent / "page"
MEDIA = {"vtt": "text/vtt", "srt": "application/x-subrip", "jsonl": "application/x-ndjson"}
PAGE_POLICY = "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, *, host: str = "127.0.0.1") -> Starlette:
    """The application of a service; `host` is the name that it is bound to."""
    routes = Routes(service)
    chat, realtime, whip = Chat(service), Realtime(service), Whip(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        keeping = asyncio.create_task(service.keep_all())
        yield
        keeping.cancel()
        chat.close()

    def route(path: str, handler: Handler, *methods: str) -> Route:
        return Route(path, guarded(handler), methods=list(methods) or ["GET"])

    stream = "/v1/streams/{id}"
    table: list[BaseRoute] = [
        route("/health", routes.health),
        route("/ready", routes.ready),
        route("/metrics", routes.metrics),
        route("/v1/models", routes.models),
        route("/v1/chat/completions", chat.complete, "POST"),
        route("/v1/streams", routes.streams),
        route("/v1/streams", routes.start, "POST"),
        route("/v1/snapshots", routes.snapshots),
        route("/v1/snapshots", routes.store, "POST"),
        route(stream, routes.status),
        route(stream, routes.end, "DELETE"),
        route(f"{stream}/frames", routes.push, "POST"),
        route(f"{stream}/questions", routes.ask, "POST"),
        route(f"{stream}/pause", functools.partial(routes.pause, True), "POST"),
        route(f"{stream}/resume", functools.partial(routes.pause, False), "POST"),
        route(f"{stream}/snapshot", routes.keep, "POST"),
        route(f"{stream}/snapshot", routes.fetch),
        route(f"{stream}/frame.jpg", routes.picture),
        route(f"{stream}/captions", routes.captions),
        *(route(f"{stream}/captions.{suffix}", functools.partial(routes.download, suffix)) for suffix in MEDIA),
        WebSocketRoute("/v1/realtime", realtime.serve),
        route("/v1/whip", whip.offer, "POST"),
        route("/", routes.page),
        route("/sample.mp4", routes.sample),
        route("/page/{name}", routes.page_file),
    ]
    guard = Middleware(Guard, keys=service.config.keys, metrics=service.metrics, host=host)
    return Starlette(routes=table, middleware=[guard], lifespan=lifespan, exception_handlers={HTTPException: _http_error})


def guarded(handler: Handler) -> Handler:
    """What is refused becomes an answer."""

    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except UserError as error:
            return refusal(error)
        except TimeoutError:
            return refusal(UserError("the device did not answer in time"), 504)
        except Exception as error:  # a fault of ours: the log has all of it, the client none
            log("server.error", path=request.url.path, message=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            return refusal(UserError("something went wrong in the server"), 500)

    return wrapped


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(UserError(str(error.detail)), error.status_code)


class Routes:
    """Every handler but those of chats and WebSockets."""

    def __init__(self, service: Service):
        self.service, self.limits = service, service.limits
        self._files = StaticFiles(directory=PAGE)

    # The server

    async def health(self, _: Request) -> Response:
        failed = bool(self.service.failure)
        return JSONResponse({"status": "failed" if failed else "ok"}, 500 if failed else 200)

    async def ready(self, _: Request) -> Response:
        if self.service.ready:
            return JSONResponse({"status": "ready"})
        status = "stopping" if self.service.sessions.draining else "loading"
        return JSONResponse({"status": status}, 503, {"Retry-After": "2"})

    async def metrics(self, _: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Request) -> Response:
        service, s = self.service, self.service.spec.stream
        about = {
            "random_weights": service.random,
            "places": service.config.places,
            "width": service.shape.width,
            "height": service.shape.height,
            "fps": s.fps,
            "chunk_seconds": s.chunk_seconds,
            "vision_window": s.vision_window,
            "text_window": s.text_window,
            "state_bytes": int(service.metrics.state_bytes._value.get()) // service.config.places,
        }
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "svlm-jax", "svlm": about}
        return JSONResponse({"object": "list", "data": [model]})

    # Streams

    def _session(self, request: Request) -> Session:
        return self.service.sessions.get(request.path_params["id"], request.state.owner)

    def _status(self, session: Session) -> dict[str, Any]:
        return session.status(self.service.spec.cache.slots)

    async def streams(self, request: Request) -> Response:
        listed = self.service.sessions.all(request.state.owner)
        return JSONResponse({"object": "list", "data": [self._status(session) for session in listed]})

    async def start(self, request: Request) -> Response:
        wish = await read_json(request, self.limits.json_bytes, self.limits.body_seconds)
        session = await asyncio.to_thread(self.service.open, wish, request.state.owner)
        return JSONResponse(self._status(session), 201, {"Location": f"/v1/streams/{session.id}"})

    async def status(self, request: Request) -> Response:
        return JSONResponse(self._status(self._session(request)))

    async def end(self, request: Request) -> Response:
        session = self._session(request)
        await asyncio.to_thread(self.service.sessions.end, session, "deleted")
        return JSONResponse(self._status(session))

    async def push(self, request: Request) -> Response:
        """One picture. `t` is its time in seconds; `last=1` says that no more will come (the body may be empty then)."""
        session = self._session(request)
        source = pushable(session)
        seconds = request.query_params.get("t") or request.headers.get("x-timestamp")
        data = await read_body(request, self.limits.frame_bytes, self.limits.body_seconds)
        last = request.query_params.get("last") in ("1", "true")
        if data:
            await push(source, data, _time(seconds), self.limits)
        elif not last:
            raise Refused("the body must be a picture: JPEG, PNG or WebP")
        if last:
            source.finish()
        counts = source.counts
        return JSONResponse({"received": counts.received, "dropped": counts.dropped, "broken": counts.broken}, 202)

    async def ask(self, request: Request) -> Response:
        session = self._session(request)
        body = await read_json(request, self.limits.json_bytes, self.limits.body_seconds)
        self.service.ask(session, body.get("text"))
        return JSONResponse({"waiting": len(session.questions)}, 202)

    async def pause(self, paused: bool, request: Request) -> Response:
        session = self._session(request)
        await asyncio.to_thread(self.service.sessions.pause, session, paused)
        return JSONResponse(self._status(session))

    async def picture(self, request: Request) -> Response:
        """What the model has seen last."""
        frame = self._session(request).frame
        if frame is None:
            raise Refused("nothing was seen yet", status=404)

        def encoded() -> bytes:
            out = io.BytesIO()
            Image.fromarray(frame.transpose(1, 2, 0)).save(out, "JPEG", quality=80)
            return out.getvalue()

        return Response(await asyncio.to_thread(encoded), media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    # Captions

    async def captions(self, request: Request) -> Response:
        """Server-sent events: from `Last-Event-ID` on, or from the stream's beginning."""
        session = self._session(request)
        given = request.headers.get("last-event-id") or request.query_params.get("last_event_id") or "0"
        if not given.isdecimal() or len(given) > 18:
            raise Refused("Last-Event-ID must be a number")
        if session.journal.listeners >= self.limits.listeners:
            raise Refused(f"{self.limits.listeners} listeners are the most of one stream", status=429)
        return EventStream(session.journal, int(given), self.limits.send_seconds)

    async def download(self, suffix: str, request: Request) -> Response:
        session = self._session(request)
        events, missed = session.journal.after(0)
        text = document((caption(event) for event in events if event.caption), f".{suffix}")
        headers = {"Content-Disposition": f'attachment; filename="{session.id}.{suffix}"', "X-Svlm-Missed": str(missed)}
        return PlainTextResponse(text, headers=headers, media_type=MEDIA[suffix])

    # Snapshots

    async def keep(self, request: Request) -> Response:
        id = await asyncio.to_thread(self.service.keep, self._session(request))
        return JSONResponse({"resume": id}, 201)

    async def fetch(self, request: Request) -> Response:
        session = self._session(request)
        data = await asyncio.to_thread(self.service.snapshot, session)
        headers = {"Content-Disposition": f'attachment; filename="{session.id}.svlm"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def store(self, request: Request) -> Response:
        data = await read_body(request, self.service.snapshot_bytes, 30 * self.limits.body_seconds)
        return JSONResponse({"resume": await asyncio.to_thread(self.service.store, data, request.state.owner)}, 201)

    async def snapshots(self, request: Request) -> Response:
        """Those of this key that wait to be resumed."""
        shelf = self.service.shelf
        ids = await asyncio.to_thread(shelf.ids, request.state.owner) if shelf else []
        running = {session.id for session in self.service.sessions.all() if not session.ended}
        return JSONResponse({"object": "list", "data": [{"resume": id} for id in ids if id not in running]})

    # The page

    async def page(self, _: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})

    async def page_file(self, request: Request) -> Response:
        response = await self._files.get_response(request.path_params["name"], request.scope)
        response.headers["Cache-Control"] = "no-cache"
        return response

    async def sample(self, _: Request) -> Response:
        return FileResponse(clip_path(), media_type="video/mp4")


def caption(event: Event) -> Caption:
    data = event.data
    return Caption(float(data["start"]), float(data["end"]), data["text"])


def _time(text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Refused("t must be a number of seconds")
    return value
