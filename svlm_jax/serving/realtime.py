"""`/v1/realtime`: one stream over one WebSocket. Frames and questions go up, words come down a round at a time, asked for or not.

Up: events of OpenAI's Realtime API as text messages, or frames as binary ones: a byte for the kind (1 a picture, 2 no more frames,
3 make a round of what is there), eight for its time (microseconds, big-endian) and the picture.
"""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import json
import struct
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from svlm_jax.errors import UserError
from svlm_jax.serving import realtime_events as wire
from svlm_jax.serving.events import Event
from svlm_jax.serving.guard import KEY_PROTOCOL, parse_json
from svlm_jax.serving.limits import Refused, TooFast, TooLarge
from svlm_jax.serving.pushing import push, pushable
from svlm_jax.serving.service import Service, wish_of
from svlm_jax.serving.sessions import Session

HEAD = struct.Struct("!BQ")  # kind, microseconds
PICTURE, LAST, FLUSH = 1, 2, 3
MISTAKES = 20  # of a client, after which its connection is closed
SETTINGS = {"clock", "query", "previous_text", "seed", "name", "resume"}  # of the address
CLOSING = {"finished": 1000, "deleted": 1000, "drain": 1001, "stopped": 1001}  # why the stream ended: how the socket closes; else 1011


class Realtime:
    """The endpoint."""

    def __init__(self, service: Service):
        self.service = service

    async def serve(self, socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(next((name for name in offered if not name.startswith(KEY_PROTOCOL)), None))
        try:
            wish = wish_of(socket.query_params, SETTINGS)
            session = await asyncio.to_thread(self.service.open, wish, socket.state.owner)
        except UserError as error:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await socket.send_text(json.dumps(wire.error(error)))
                await socket.close(getattr(error, "close", 1008), str(error)[:120])
            return
        await Connection(self.service, socket, session).run()


class Connection:
    """One client and its stream."""

    def __init__(self, service: Service, socket: WebSocket, session: Session):
        self.service, self.socket, self.session = service, socket, session
        self.limits = service.limits
        self._mistakes = 0
        self._response: wire.Response | None = None
        self._cancelled: float | None = None  # the start of the round that the client does not want to hear
        self._sending = asyncio.Lock()
        self._last = session.journal.last
        self._item: str | None = None  # the newest item's name

    async def run(self) -> None:
        await self._send(wire.event("session.created", session=self._describe()))
        hearing, telling = asyncio.create_task(self._hear()), asyncio.create_task(self._tell())
        done, waiting = await asyncio.wait((hearing, telling), return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        code, reason = 1011, ""
        for task in done:
            failure = task.exception()
            if isinstance(failure, Refused):
                code, reason = failure.close, str(failure)
            elif isinstance(failure, TimeoutError):
                code, reason = 1008, "too slow to listen"
            elif failure is not None and not isinstance(failure, WebSocketDisconnect | RuntimeError):
                raise failure
            elif failure is None:
                code, reason = task.result()
        if not self.session.ended:  # the client has left: whoever comes back with the name may go on
            more: dict[str, Any] = {}
            if self.service.shelf is not None:
                with contextlib.suppress(UserError, TimeoutError):
                    more["resume"] = await asyncio.to_thread(self.service.keep, self.session)
            await asyncio.to_thread(self.service.sessions.end, self.session, "left", reason, **more)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(self.limits.send_seconds):
                await self.socket.close(code, reason[:120])

    def _describe(self) -> wire.Json:
        s, session = self.service.spec.stream, self.session
        query = s.query if session.wish.query is None else session.wish.query
        extras = {
            "stream": session.id,
            "clock": "live" if session.source.live else "file",
            "fps": s.fps,
            "chunk_seconds": s.chunk_seconds,
            "width": self.service.shape.width,
            "height": self.service.shape.height,
            "position": session.position,
        }
        return wire.session(session.id, self.service.name, query, s.max_new_tokens, extras)

    async def _send(self, *events: wire.Json) -> None:
        async with self._sending:
            for event in events:
                async with asyncio.timeout(self.limits.send_seconds):
                    await self.socket.send_text(json.dumps(event, ensure_ascii=False))

    # Down

    async def _tell(self) -> tuple[int, str]:
        journal = self.session.journal
        with journal.listen() as listener:
            while True:
                draft = journal.draft
                events, missed = journal.after(self._last)
                if missed:
                    await self._send(wire.event("svlm", svlm={"type": "gap", "reason": "history", "events": missed}))
                for event in events:
                    self._last = event.id
                    await self._send(*self._translate(event))
                    if event.type == "end":
                        return CLOSING.get(event.data["reason"], 1011), event.data["message"] or event.data["reason"]
                if draft is not None and not events and self._response is None and draft.start != self._cancelled:
                    self._response = wire.Response(draft.start)
                    await self._send(*self._response.begin(draft.text))
                await listener.wait(60.0)

    def _translate(self, event: Event) -> list[wire.Json]:
        if not event.caption:
            return [wire.event("svlm", svlm=event.data)]
        data = event.data
        start = data["start"]
        if self._cancelled is not None and abs(self._cancelled - start) < 1e-3:
            self._cancelled = None
            return []
        response, self._response = self._response or wire.Response(start), None
        extras = {"type": event.type, "start": start, "end": data["end"]}
        if event.type == "silence":
            return response.silent(extras)
        tokens = len(self.service.checkpoint.tokenizer.encode_plain(data["text"]))
        return response.finish(data["text"], tokens, extras)

    # Up

    async def _hear(self) -> tuple[int, str]:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return 1000, "the client has left"
            about = None
            try:
                if message.get("bytes") is not None:
                    await self._binary(message["bytes"])
                else:
                    text = message.get("text") or ""
                    if len(text) > 4 * self.limits.frame_bytes // 3 + self.limits.json_bytes:
                        raise TooLarge("the message is too large")
                    data = parse_json(text)
                    about = data.get("event_id") if isinstance(data.get("event_id"), str) else None
                    await self._event(data, about)
            except (TooLarge, TooFast) as error:
                await self._send(wire.error(error, about))
                raise
            except UserError as error:
                self._mistakes += 1
                await self._send(wire.error(error, about))
                if self._mistakes >= MISTAKES:
                    raise Refused("too many mistakes") from None

    async def _binary(self, data: bytes) -> None:
        if len(data) < HEAD.size:
            raise Refused("a binary message begins with a byte for its kind and eight for its time")
        kind, micros = HEAD.unpack_from(data)
        source = pushable(self.session)
        if kind == PICTURE:
            await self._picture(data[HEAD.size :], micros / 1e6)
        elif kind == LAST:
            source.finish()
        elif kind == FLUSH:
            source.flush()
        else:
            raise Refused(f"there is no binary message of kind {kind}: 1 is a picture, 2 the end, 3 makes a round")

    async def _picture(self, data: bytes, seconds: float | None) -> None:
        if len(data) > self.limits.frame_bytes:
            raise TooLarge(f"a picture of {len(data):,} bytes is too large: {self.limits.frame_bytes:,} are the most")
        if not data:
            raise Refused("an empty picture")
        await push(pushable(self.session), data, seconds, self.limits)

    async def _event(self, data: dict[str, Any], about: str | None) -> None:
        known = {
            "session.update": self._update,
            "conversation.item.create": self._create,
            "response.create": self._respond,
            "response.cancel": self._cancel,
        }
        handle = known.get(str(data.get("type")))
        if handle is None:
            raise Refused(f"there is no event {str(data.get('type'))[:40]!r} here: {', '.join(known)} are those that do something")
        await handle(data)

    async def _update(self, data: dict[str, Any]) -> None:
        """Instructions are the query of a stream that has not begun, and a question in one that has."""
        wanted = data.get("session")
        if not isinstance(wanted, dict):
            raise Refused("session.update needs a session")
        if wanted.get("output_modalities", ["text"]) != ["text"]:
            raise Refused("output_modalities must be ['text']: there is no sound here")
        unknown = sorted(set(wanted) - {"type", "instructions", "output_modalities", "model"})
        if unknown:
            raise Refused(f"session.{unknown[0][:40]} cannot be set: instructions can")
        if "instructions" in wanted:
            if self.session.rounds == 0 and self.session.row is None:
                query = self.service.check_query(wanted["instructions"])
                self.session.wish = dataclasses.replace(self.session.wish, query=query)
            else:
                self.service.ask(self.session, wanted["instructions"])
        await self._send(wire.event("session.updated", session=self._describe()))

    async def _create(self, data: dict[str, Any]) -> None:
        """Texts are questions for the next round, images are frames."""
        item = data.get("item")
        if not isinstance(item, dict) or item.get("type") != "message" or item.get("role") != "user":
            raise Refused("conversation.item.create needs an item of type message and role user")
        content = item.get("content")
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise Refused("an item's content must be a list of parts")
        for part in content:
            if part.get("type") == "input_text":
                self.service.ask(self.session, part.get("text"))
            elif part.get("type") == "input_image":
                await self._picture(data_uri(part.get("image_url")), _micros(data))
            else:
                raise Refused(f"a part of type {str(part.get('type'))[:40]!r} cannot be used: input_text and input_image can")
        texts = [part for part in content if part["type"] == "input_text"]  # pictures are not sent back
        name = item["id"] if isinstance(item.get("id"), str) else wire.new("item")
        created = {"id": name, "object": "realtime.item", "type": "message", "status": "completed", "role": "user", "content": texts}
        before, self._item = self._item, name
        for kind in ("conversation.item.added", "conversation.item.done"):
            await self._send(wire.event(kind, item=created, previous_item_id=before))

    async def _respond(self, data: dict[str, Any]) -> None:
        """Rounds come by themselves. Asked for by the file's clock, one is made of the frames that are there."""
        wanted = data.get("response") or {}
        if not isinstance(wanted, dict):
            raise Refused("response must be an object")
        if wanted.get("instructions"):
            self.service.ask(self.session, wanted["instructions"])
        if self.session.kind == "push" and not self.session.source.live:
            pushable(self.session).flush()

    async def _cancel(self, data: dict[str, Any]) -> None:
        response = self._response
        if response is None or data.get("response_id") not in (None, response.id):
            raise Refused("no response is on its way")
        self._response, self._cancelled = None, response.start
        await self._send(response.cancel())


def data_uri(text: Any) -> bytes:
    """The bytes of `data:image/jpeg;base64,...`. Refused for anything else: an address is not fetched."""
    head, comma, body = text.partition(",") if isinstance(text, str) else ("", "", "")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise Refused("a picture must be a data URI: data:image/jpeg;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise Refused("the picture's base64 is damaged") from None


def _micros(data: dict[str, Any]) -> float | None:
    """A frame's time in seconds, from `svlm.timestamp` in microseconds."""
    extras = data.get("svlm")
    stamp = extras.get("timestamp") if isinstance(extras, dict) else None
    if stamp is None:
        return None
    if isinstance(stamp, bool) or not isinstance(stamp, int | float):
        raise Refused("svlm.timestamp must be a number of microseconds")
    return float(stamp) / 1e6
