"""Streams as clients know them: what was asked for, how far it is, what was said."""

import collections
import contextlib
import dataclasses
import json
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from svlm_jax.serving.events import Journal
from svlm_jax.serving.limits import Full, Limits, Refused
from svlm_jax.serving.metrics import Metrics
from svlm_jax.serving.sources import Source
from svlm_jax.streaming.engine import SavedStream

LOADING = "the server is still loading: ask again when /ready says so"


def log(event: str, **fields: Any) -> None:
    """One JSON line on standard output. Where nobody reads it any more, or the disk under it is full, the streams go on without."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **fields}
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a client asked for, beyond the video."""

    query: str | None = None  # of the first round; None: the server's
    previous_text: str | None = None
    seed: int | None = None


class Session:
    """One stream. The device's thread writes what it is at; everybody reads."""

    def __init__(self, id: str, wish: Wish, journal: Journal, *, owner: str = "", kind: str = "push", name: str = ""):
        self.id, self.wish, self.journal, self.owner, self.kind = id, wish, journal, owner, kind
        self.name = name  # what the client called it
        self.source: Source = None  # type: ignore[assignment]  # set before the stream is listed
        self.created = time.time()
        self.state = "running"  # or paused, ended
        self.row: int | None = None  # of the engine, while it has one
        self.saved: SavedStream | None = None  # its state, while it has none
        self.position: float | None = None  # seconds of the stream that are covered
        self.expected: float | None = None  # where the next round begins, unless seconds are skipped
        self.skip_reason = "late"  # of the next gap
        self.questions: collections.deque[str] = collections.deque()
        self.rounds = self.spoken = self.misses = self.tokens = 0
        self.skipped = 0.0  # seconds
        self.lag: float | None = None  # seconds from the last frame to the first word, of the last live round
        self.round_seconds: float | None = None
        self.cached = 0
        self.text = ""  # what was said last
        self.frame: Any = None  # uint8 [3, height, width], the newest that the model has seen
        self.origin: dict[str, Any] = {}  # how to open the source again
        self.lock = threading.Lock()

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def ended(self) -> bool:
        return self.state == "ended"

    def ask(self, text: str, limits: Limits) -> None:
        """Puts a question into the next round. Refused where too many wait."""
        with self.lock:
            if self.ended:
                raise Refused("the stream has ended", status=409)
            if len(self.questions) >= limits.questions_waiting:
                raise Refused(f"{len(self.questions)} questions wait already: ask again after the next round", status=429)
            self.questions.append(text)

    def status(self, slots: int) -> dict[str, Any]:
        """What `GET /v1/streams/{id}` says."""
        source = self.source
        return {
            "id": self.id,
            "object": "stream",
            "name": self.name,
            "created": int(self.created),
            "state": self.state,
            "source": self.kind,
            "clock": "live" if source.live else "file",
            "position": self.position,
            "text": self.text,
            "rounds": self.rounds,
            "spoken": self.spoken,
            "tokens": self.tokens,
            "lag_seconds": self.lag,
            "round_seconds": self.round_seconds,
            "deadline_misses": self.misses,
            "skipped_seconds": round(self.skipped, 3),
            "frames": dataclasses.asdict(source.counts),
            "cache": {"tokens": self.cached, "slots": slots},
            "questions_waiting": len(self.questions),
            "last_event_id": self.journal.last,
            "video": source.info,
        }


class Sessions:
    """All streams of a server. `places` is how many can run at once."""

    def __init__(self, places: int, limits: Limits, metrics: Metrics, changed: Callable[[], None]):
        self.places, self.limits, self.metrics, self._changed = places, limits, metrics, changed
        self._all: dict[str, Session] = {}
        self._lock = threading.Lock()
        self.draining = False
        self.obstacle: Callable[[bool], str] = lambda live: LOADING  # why a stream (live or not) cannot run now; the scheduler knows

    def admit(self, session: Session, open_source: Callable[[], Source], *, live: bool) -> None:
        """Takes a stream in, and opens its source. Raises Full, with the reason, or what `open_source` raises."""
        with self._lock:
            alive = [s for s in self._all.values() if not s.ended]
            mine = sum(s.owner == session.owner for s in alive)
            why, reason = "", ""
            if self.draining:
                why, reason = "the server is about to stop", "draining"
            elif session.id in self._all and not self._all[session.id].ended:
                raise Refused(f"stream {session.id} runs already", status=409)
            elif len(alive) >= self.places:
                why, reason = f"all {self.places} places are taken: try again later, or start the server with more --streams", "places"
            elif mine >= self.limits.streams_per_key:
                why, reason = f"this key has {mine} streams, which is its limit: end one first", "key"
            elif too_slow := self.obstacle(live):
                why, reason = too_slow, "deadline"
            if why:
                self.metrics.refused.labels(reason).inc()
                raise Full(why)
            session.source = open_source()
            self._all[session.id] = session
            self._forget()
        self.metrics.started.labels(session.kind).inc()
        log("stream.started", stream=session.id, source=session.kind, clock="live" if live else "file", name=session.name)
        self._changed()

    def _forget(self) -> None:
        ended = [id for id, s in self._all.items() if s.ended]
        for id in ended[: max(0, len(ended) - self.limits.ended_streams)]:
            del self._all[id]

    def get(self, id: str, owner: str | None = None) -> Session:
        """Raises Refused (404) where there is none, or it is another's."""
        session = self._all.get(id)
        if session is None or (owner is not None and session.owner != owner):
            raise Refused(f"there is no stream {id[:40]}: it has ended long ago, or never was", status=404)
        return session

    def all(self, owner: str | None = None) -> list[Session]:
        with self._lock:
            return [s for s in self._all.values() if owner is None or s.owner == owner]

    def running(self) -> list[Session]:
        return [s for s in self.all() if s.running]

    def pause(self, session: Session, paused: bool) -> None:
        """A paused stream keeps its place and what it remembers."""
        with session.lock:
            if session.ended:
                raise Refused("the stream has ended", status=409)
            if paused == (session.state == "paused"):
                return
            session.source.pause(paused)
            session.state = "paused" if paused else "running"
            if not paused:
                session.skip_reason = "paused"
        session.journal.publish("state", state=session.state)
        log(f"stream.{'paused' if paused else 'resumed'}", stream=session.id)
        self._changed()

    def end(self, session: Session, reason: str, message: str = "", **more: Any) -> None:
        """Ends a stream; a second call does nothing. Its row is emptied by the scheduler."""
        with session.lock:
            if session.ended:
                return
            session.state = "ended"
        session.source.close()
        counts = session.source.counts
        for fate, count in (("received", counts.received), ("thinned", counts.thinned), ("dropped", counts.dropped), ("broken", counts.broken)):
            self.metrics.frames.labels(fate).inc(count)
        self.metrics.ended.labels(reason).inc()
        session.journal.publish("end", reason=reason, message=message, **more)
        log(
            "stream.ended",
            stream=session.id,
            reason=reason,
            message=message,
            rounds=session.rounds,
            position=session.position,
            skipped_seconds=round(session.skipped, 3),
            deadline_misses=session.misses,
            frames=dataclasses.asdict(counts),
        )
        self._changed()


def new_id() -> str:
    return f"strm_{secrets.token_hex(8)}"


def check_text(text: Any, what: str, most: int) -> str:
    """A text that a client sent. Refused where it is none, or too long."""
    if not isinstance(text, str):
        raise Refused(f"{what} must be a text")
    if len(text) > most:
        raise Refused(f"{what} has {len(text)} characters and {most} are the most: shorten it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(f"{what} holds half a character (a lone surrogate)") from None
    return text
