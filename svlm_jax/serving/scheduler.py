"""The one thread that talks to the device: it decides when a round is due and who takes part, and tells each stream what was said.

Live streams, and files shown at their own speed, share a grid of instants, one an interval. A stream without a round at its instant is left
out: it is taken out of its row and comes back when it has one, so that nobody waits for it and its own past stays whole. Where all streams
are files, a round is run as soon as all of them have one, or one has waited long enough.
"""

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from svlm_jax.captions import Caption, record
from svlm_jax.errors import UserError
from svlm_jax.serving.events import Draft
from svlm_jax.serving.metrics import Metrics
from svlm_jax.serving.sessions import LOADING, Session, Sessions, log
from svlm_jax.serving.sources import Grid, Round
from svlm_jax.streaming.engine import Engine, SavedStream
from svlm_jax.streaming.prompt import LONGEST_TIME
from svlm_jax.types import Array

GRACE = 0.03  # seconds after a round's last sample time, in which its frame is decoded
STRAGGLERS = 0.04  # more of them for live streams that are not ready though the others are
PATIENCE = 0.25  # seconds that a file's round waits for those of other files
HELD = 5.0  # seconds that a stream without a row stays on the device, before it is kept by the host
RECENT = 60.0  # seconds whose rounds say whether another stream would fit
SHARE = 0.95  # of the interval that a round may take, for a live stream to be admitted


class Scheduler:
    """`run` is the thread. `ready` once everything is compiled and measured; `failure` says why it ended, if it was not asked to."""

    def __init__(self, engine: Engine, sessions: Sessions, metrics: Metrics, *, now: Callable[[], float] = time.monotonic):
        self.engine, self.sessions, self.metrics, self._now = engine, sessions, metrics, now
        self.chunk = float(engine.spec.stream.chunk_seconds)
        self.samples = Grid(now(), self.chunk)  # when the last sample of a live round is due
        self.grid = Grid(self.samples.start + GRACE, self.chunk)  # when the round is
        self.ready = False
        self.failure = ""
        self.rows: dict[int, Session] = {}
        self._took: collections.deque[tuple[float, float]] = collections.deque(maxlen=512)  # when a round ended, and the seconds it took
        self._best = math.inf  # the quickest round's
        self._jobs: collections.deque[tuple[Future, Callable[[], Any]]] = collections.deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._doubted = False  # a stream was refused for what the last rounds took
        self._next = 0.0  # the grid's next instant
        self._waiting_since: float | None = None
        self._parked: dict[str, float] = {}  # stream: since when
        self._early = ThreadPoolExecutor(1, "first-words")
        sessions.obstacle = self.obstacle
        metrics.places.set(sessions.places)

    # Other threads

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def submit(self, work: Callable[[], Any]) -> Future:
        """Runs `work` in the device's thread, between two rounds."""
        future: Future = Future()
        with self._changed:
            if self._stopped:
                future.set_exception(UserError("the server is about to stop"))
                return future
            self._jobs.append((future, work))
            self._changed.notify_all()
        return future

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def measure(self, seconds: float) -> None:
        """Notes how long a round took."""
        self._took.append((self._now(), seconds))
        self._best = min(self._best, seconds)

    def round_seconds(self) -> float:
        """What nearly all rounds of the last minute stayed below (their 95th percentile); the best round ever, where there were none."""
        since = self._now() - RECENT
        times = sorted(seconds for when, seconds in list(self._took) if when >= since)
        return times[min(len(times) - 1, math.ceil(0.95 * len(times)))] if times else self._best

    def obstacle(self, live: bool) -> str:
        """Why another stream would not keep its deadlines; empty where it would."""
        if not self.ready:
            return LOADING
        took = self.round_seconds()
        if live and took > SHARE * self.chunk:
            self._doubted = True
            return f"a round takes {took:.2f} s here and there is one every {self.chunk:g} s: use fewer --streams, or a lower --fps or --max-pixels"
        return ""

    # The device's thread

    def run(self) -> None:
        try:
            self.rehearse()
            while True:
                chosen = self._wait()
                if chosen is None:
                    break
                self._tidy()
                if chosen:
                    self._run_round(chosen)
        except Exception as error:  # the state is lost with the round: nothing can go on
            logging.exception("the device's thread ended")
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            self.ready = False
            self.stop()
            self._early.shutdown(wait=False)
            for session in self.sessions.all():
                self.sessions.end(session, "error" if self.failure else "stopped", self.failure)
            for future, _ in self._jobs:
                future.set_exception(UserError("the server is about to stop"))

    def rehearse(self) -> None:
        """Every program once or more, in the way that rounds will call it, and how long a round with all rows takes."""
        engine = self.engine
        self._fill_rows()
        for index in range(4):
            took = self._empty_round(index)
            if index == 1:
                saved = on_host(engine.take(0))
                engine.close(0)
                engine.put(0, saved)
            elif index > 1:
                self.measure(took)
        self._empty_rows()
        self.ready = True
        log("server.ready", places=self.sessions.places, round_seconds=round(self.round_seconds(), 4), interval_seconds=self.chunk)

    def _fill_rows(self) -> None:
        for row in range(self.engine.streams):
            self.engine.open(row)

    def _empty_round(self, index: int) -> float:
        """Seconds of a round with all rows, which nobody hears of."""
        engine, spec = self.engine, self.engine.spec
        frames = np.zeros((engine.streams, spec.stream.frames_per_round, 3, spec.height, spec.width), np.uint8)
        began = time.perf_counter()
        said = engine.step(frames, {row: (float(index), index + 1.0) for row in range(engine.streams)})
        np.asarray(said.first)
        engine.note(said.tokens())
        return time.perf_counter() - began

    def _trial(self) -> float:
        """Seconds of a round with all rows, where none is taken."""
        self._fill_rows()
        took = self._empty_round(0)
        self._empty_rows()
        return took

    def _empty_rows(self) -> None:
        for row in range(self.engine.streams):
            self.engine.close(row)
        jax.block_until_ready(self.engine.state)

    def _wait(self) -> Sequence[Session] | None:
        """Until a round is due: the streams that take part, none of them if there was only other work; None at the end."""
        with self._changed:
            while True:
                if self._stopped:
                    return None
                if self._jobs or self._doubted:
                    break
                running = self.sessions.running()
                for session in running:
                    if session.source.ended:
                        failure = session.source.failure
                        self.sessions.end(session, "error" if failure else "finished", failure)
                running = [s for s in running if s.running]
                now = self._now()
                ready = [s for s in running if s.source.ready()]
                if any(s.source.live or s.source.paced for s in running):
                    until = self._on_grid(running, ready, now)
                else:
                    until = self._as_fast_as_possible(running, ready, now)
                if until is None:
                    return ready
                if any(session.ended for session in self.rows.values()):
                    return ()
                self._changed.wait(max(0.001, min(until, 1.0)))
        while self._jobs:
            future, work = self._jobs.popleft()
            try:
                future.set_result(work())
            except UserError as error:
                future.set_exception(error)
        if self._doubted:  # the machine may have been busy with something else then, and without streams there are no new rounds to tell
            self._doubted = False
            if not self.rows:
                took = self._trial()
                self._took.clear()  # what was slow has passed: the machine as it is now decides
                self.measure(took)
        return ()

    def _on_grid(self, running: Sequence[Session], ready: Sequence[Session], now: float) -> float | None:
        """Seconds to wait; None where the instant has come."""
        if self._next <= now - 2 * self.chunk:  # nobody was there
            self._next = self.grid.next(now - self.chunk)
        if now < self._next:
            return self._next - now
        if len(ready) < len(running) and now < self._next + STRAGGLERS:
            return self._next + STRAGGLERS - now
        if not ready:
            self._next = self.grid.next(now)
            return self._next - now
        return None

    def _as_fast_as_possible(self, running: Sequence[Session], ready: Sequence[Session], now: float) -> float | None:
        if not ready:
            self._waiting_since = None
            return 1.0
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        if len(ready) == len(running) or now - self._waiting_since >= PATIENCE:
            self._waiting_since = None
            return None
        return PATIENCE - (now - self._waiting_since)

    def _tidy(self) -> None:
        """Empties the rows of streams that have ended, and moves those that wait long off the device."""
        for row, session in list(self.rows.items()):
            if session.ended:
                self.engine.close(row)
                del self.rows[row]
                session.row = None
        now, waiting = self._now(), {}
        for session in self.sessions.all():
            if session.ended:
                session.saved = None
            elif session.saved is not None:
                since = self._parked.get(session.id, now)
                if since < math.inf and now - since > HELD:
                    session.saved = on_host(session.saved)
                    since = math.inf
                waiting[session.id] = since
        self._parked = waiting
        states = collections.Counter(s.state for s in self.sessions.all())
        for state in ("running", "paused"):
            self.metrics.streams.labels(state).set(states[state])

    def _seat(self, session: Session) -> bool:
        """Whether the stream has a row for this round."""
        if session.row is not None:
            return True
        row = next(row for row in range(self.engine.streams) if row not in self.rows)
        try:
            if session.saved is not None:
                self.engine.put(row, session.saved)
            else:
                wish = session.wish
                self.engine.open(row, previous_text=wish.previous_text, seed=wish.seed, query=wish.query)
        except UserError as error:
            self.sessions.end(session, "error", str(error))
            return False
        session.saved, session.row, self.rows[row] = None, row, session
        return True

    def _park(self, session: Session) -> None:
        assert session.row is not None
        session.saved = self.engine.take(session.row)
        self.engine.close(session.row)
        del self.rows[session.row]
        session.row = None
        self.metrics.parked.inc()

    def _run_round(self, ready: Sequence[Session]) -> None:
        engine, spec = self.engine, self.engine.spec
        due, began = self._next, time.perf_counter()
        with self.metrics.timed("prepare"):
            rounds: dict[Session, Round] = {}
            for session in ready:
                round = session.source.take()
                if round is not None and round.end > LONGEST_TIME[1]:
                    self.sessions.end(session, "error", "the stream is 115 days long, which is the most: start a new one")
                elif round is not None and session.running:
                    rounds[session] = round
            for session in list(self.rows.values()):
                if session not in rounds:
                    self._park(session)
            rounds = {session: round for session, round in rounds.items() if self._seat(session)}
            if not rounds:
                return
            frames = np.zeros((engine.streams, spec.stream.frames_per_round, 3, spec.height, spec.width), np.uint8)
            times: dict[int, tuple[float, float]] = {}
            questions: dict[int, str] = {}
            for session, round in rounds.items():
                assert session.row is not None
                self._tell_gap(session, round)
                frames[session.row], times[session.row] = round.frames, (round.start, round.end)
                with session.lock:
                    asked = self._fitting(session)
                if asked:
                    questions[session.row] = asked
                    self.metrics.questions.inc()
                    session.journal.publish("question", start=_number(round.start), text=asked)
                session.frame = round.frames[-1]
        words: list[Future] = []
        said = engine.step(frames, times, questions, begun=lambda first: words.append(self._early.submit(self._first_words, rounds, first)))
        words[0].result()
        with self.metrics.timed("rest"):
            tokens = said.tokens()
            engine.note(tokens)
            cached = np.asarray(said.turn.cached)
        took = time.perf_counter() - began
        self.measure(took)
        self.metrics.stage.labels("round").observe(took)
        self.metrics.rounds.inc()
        self.metrics.fill.set(float(np.mean([cached[s.row] for s in rounds])) / spec.cache.slots)
        for session, round in rounds.items():
            assert session.row is not None
            self._tell(session, round, tokens[session.row], int(cached[session.row]), took)
        self._count_misses(rounds, due)

    def _fitting(self, session: Session) -> str:
        """The questions that wait, joined, as many as there is room for; the others wait for the next round."""
        asked = ""
        while session.questions:
            longer = f"{asked} {session.questions[0]}".strip()
            if asked and len(self.engine.tokenizer.encode_plain(longer)) > self.engine.spec.stream.question_capacity:
                break
            asked = longer
            session.questions.popleft()
        return asked

    def _tell_gap(self, session: Session, round: Round) -> None:
        if session.expected is not None and round.start > session.expected + 1e-3:
            seconds = round.start - session.expected
            session.skipped += seconds
            self.metrics.skipped.labels(session.skip_reason).inc(seconds)
            start, end = _number(session.expected), _number(round.start)
            session.journal.publish("gap", start=start, end=end, reason=session.skip_reason)
            log("stream.gap", stream=session.id, start=start, end=end, reason=session.skip_reason)
        session.skip_reason = "late"
        session.expected = round.end

    def _first_words(self, rounds: dict[Session, Round], first: Array) -> None:
        """Waits for the first tokens, int32 [B], and tells them; in a thread of its own."""
        with self.metrics.timed("first"):
            first = np.asarray(first)
        now, p = self._now(), self.engine.spec.prompt
        for session, round in rounds.items():
            assert session.row is not None
            id = int(first[session.row])
            if session.source.live:
                session.lag = now - round.arrived
                self.metrics.lag.observe(session.lag)
            text = "" if id in (p.ellipsis, p.im_end, *p.blanks) else self.engine.spoken([id])
            if text and "\ufffd" not in text:
                session.journal.begin(Draft(round.start, text))

    def _tell(self, session: Session, round: Round, tokens: list[int], cached: int, took: float) -> None:
        caption = Caption(round.start, round.end, self.engine.spoken(tokens))
        session.rounds += 1
        session.spoken += not caption.silent
        session.tokens += len(tokens)
        session.position, session.cached, session.round_seconds = round.end, cached, took
        line = record(caption)
        session.text = str(line["text"])
        kind = str(line.pop("type"))
        self.metrics.captions.labels(kind).inc()
        self.metrics.tokens.inc(len(tokens))
        session.journal.publish(kind, **line)

    def _count_misses(self, rounds: dict[Session, Round], due: float) -> None:
        """Of a round on the grid, and the grid's next instant."""
        bound = [s for s in rounds if s.source.live or s.source.paced]
        if not bound:
            return
        now = self._now()
        self._next = self.grid.next(max(due, now - self.chunk))
        if now > due + self.chunk:
            for session in bound:
                session.misses += 1
                self.metrics.misses.inc()
                if session.source.live and session.running:
                    session.skip_reason = "busy"


def on_host(saved: SavedStream) -> SavedStream:
    """A stream out of its row, in the host's memory."""
    return dataclasses.replace(saved, state=jax.tree.map(np.asarray, saved.state))


def _number(seconds: float) -> float:
    return round(seconds, 3)
