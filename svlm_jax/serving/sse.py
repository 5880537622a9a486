"""A stream's events as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Segments and silences are messages; everything else is an event with a name, which readers of messages alone do not see. Every event has
its number as `id`, and a listener that comes back with it as Last-Event-ID goes on behind it.
"""

import asyncio
import contextlib
import json

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from svlm_jax.serving.events import Event, Journal

BEAT = 15.0  # seconds of quiet after which a comment shows that the connection is alive
BATCH = 500  # events in one piece


class EventStream(Response):
    """Ends with the stream's last event, when the listener leaves, or when it takes nothing for `patience` seconds."""

    media_type = "text/event-stream"

    def __init__(self, journal: Journal, last: int, patience: float):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._journal, self._last, self._patience = journal, last, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_until_gone(receive))
        done, waiting = await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if sending in done:
            sending.result()

    async def _send(self, send: Send) -> None:
        async def put(text: str, more: bool = True) -> None:
            async with asyncio.timeout(self._patience):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        with self._journal.listen() as listener, contextlib.suppress(TimeoutError):
            await put("retry: 2000\n\n")
            while True:
                events, missed = self._journal.after(self._last)
                if missed:
                    lost = {"type": "gap", "reason": "history", "events": missed}
                    await put(f"event: gap\ndata: {json.dumps(lost)}\n\n")
                for at in range(0, len(events), BATCH):
                    await put("".join(message(event) for event in events[at : at + BATCH]))
                if events:
                    self._last = events[-1].id
                if self._journal.ended and self._last >= self._journal.last:
                    break
                if not await listener.wait(BEAT):
                    await put(":\n\n")
            await put("", more=False)


def message(event: Event) -> str:
    name = "" if event.caption else f"event: {event.type}\n"
    return f"id: {event.id}\n{name}data: {json.dumps(event.data, ensure_ascii=False)}\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
