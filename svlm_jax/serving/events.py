"""What happened in a stream, numbered from 1: written by the device's thread, read by any number of listeners at their own pace.

A listener that is slow costs nothing and delays nobody: it reads from the bounded history, and is told of what it has missed.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

CAPTIONS = ("segment", "silence")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """`data` is what goes over the wire; its "type" is segment, silence, gap, question, state, or end, which is the last."""

    id: int
    type: str
    line: bytes  # JSON: a stream keeps thousands of events, which take twice the memory as objects

    @classmethod
    def of(cls, id: int, data: dict[str, Any]) -> "Event":
        return cls(id, sys.intern(data["type"]), json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.line)

    @property
    def caption(self) -> bool:
        return self.type in CAPTIONS


@dataclasses.dataclass(frozen=True)
class Draft:
    """The beginning of what is being said, while the rest is still on its way."""

    start: float  # seconds, of the round
    text: str


class Journal:
    """The events of one stream. Every method may be called from any thread, `listen` and `Listener` from an event loop."""

    def __init__(self, history: int, *, earlier: Iterable[Event] = (), first: int = 1):
        """`earlier` are those of a stream that is resumed, and `first` the number of the next."""
        self._events: collections.deque[Event] = collections.deque(earlier, history)
        self._next = first
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()
        self.draft: Draft | None = None
        self.ended = False

    def publish(self, type: str, **data: Any) -> None:
        """Adds an event. After the end there are none."""
        with self._lock:
            if self.ended:
                return
            event = Event.of(self._next, {"type": type, **data})
            self._next += 1
            self._events.append(event)
            self.ended = self.ended or type == "end"
            if event.caption:
                self.draft = None
        self._wake()

    def begin(self, draft: Draft) -> None:
        """The first words of a round, before the rest of it is known."""
        self.draft = draft
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.wake()

    def after(self, id: int) -> tuple[list[Event], int]:
        """Events with a higher number, oldest first, and how many of them are no longer kept."""
        with self._lock:
            kept = [event for event in self._events if event.id > id] if self._next - 1 > id else []
            oldest = kept[0].id if kept else self._next
            return kept, max(0, oldest - id - 1)

    @property
    def last(self) -> int:
        """The newest event's number."""
        return self._next - 1

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    @contextlib.contextmanager
    def listen(self) -> Iterator["Listener"]:
        listener = Listener(asyncio.get_running_loop())
        with self._lock:
            self._listeners.add(listener)
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.discard(listener)


class Listener:
    """Wakes one coroutine when there is something new."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._event = loop, asyncio.Event()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float) -> bool:
        """Whether something came within that time."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return False
        self._event.clear()
        return True
