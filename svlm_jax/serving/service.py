"""The server without its wire: it loads the model, starts streams as clients wish, saves and resumes them, and stops in order."""

import asyncio
import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from svlm_jax.api import Checkpoint, random_weights
from svlm_jax.bench.report import Compilations
from svlm_jax.checkpoints.load import LoadedModel
from svlm_jax.config import StreamConfig
from svlm_jax.data.resize import MIN_PIXELS, resized_size
from svlm_jax.demo.bundle import clip_path
from svlm_jax.demo.picture import HEIGHT, WIDTH
from svlm_jax.errors import UserError
from svlm_jax.programs import Programs, check_memory, device_bytes, tree_bytes
from svlm_jax.serving.clocks import Moment
from svlm_jax.serving.events import Journal
from svlm_jax.serving.limits import Limits, Refused
from svlm_jax.serving.metrics import Metrics
from svlm_jax.serving.origins import Allowed, is_live, is_url, shown
from svlm_jax.serving.pushed import LiveSource, PeerSource, PushedSource
from svlm_jax.serving.scheduler import Scheduler
from svlm_jax.serving.sessions import Session, Sessions, Wish, check_text, log, new_id
from svlm_jax.serving.snapshots import Shelf, Snapshot, capture, decode, encode, fingerprint
from svlm_jax.serving.sources import FileSource, Shape, Source
from svlm_jax.storage import Place, size_of
from svlm_jax.streaming.engine import Engine, SavedStream, make_spec
from svlm_jax.streaming.placed import check_streams
from svlm_jax.streaming.prompt import encode_query, encode_words

QUERY_ROOM = 64  # tokens of a stream's own query, at least
BUNDLED_SIZE = (HEIGHT, WIDTH)  # of the matches that the bundled model knows
USUAL_SIZE = (720, 1280)  # height and width of streams, before they are resized


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How a server is started."""

    stream: StreamConfig
    model: str | None = None
    weights: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    mesh: Mesh | None = None  # devices that share model and streams; None: the first one alone
    places: int = 4  # streams at once
    size: tuple[int, int] | None = None  # height and width of all streams, in pixels before resizing; None: the clip's, or 720p
    allowed: Allowed = dataclasses.field(default_factory=Allowed)
    state: Path | None = None  # folder of snapshots
    snapshot_seconds: float | None = None  # between snapshots of all streams
    keys: tuple[str, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)


class Service:
    """All that a server has. The constructor checks and allocates nothing large; `load` makes it ready, in a thread."""

    def __init__(self, config: ServeConfig):
        s, self.config, self.limits = config.stream, config, config.limits
        check_streams(config.mesh, config.places)
        how: dict[str, Any] = {"weights": config.weights, "dtype": config.dtype, "quantize": config.quantize, "mesh": config.mesh}
        self.checkpoint = Checkpoint.open(config.model, **how)
        height, width = config.size or (BUNDLED_SIZE if config.model is None else USUAL_SIZE)
        factor = self.checkpoint.config.vision.merged_patch_size
        size = resized_size(height, width, factor=factor, min_pixels=min(MIN_PIXELS, s.max_pixels), max_pixels=s.max_pixels)
        self.spec = make_spec(
            self.checkpoint.config, s, self.checkpoint.tokenizer, height=size[0], width=size[1], query_capacity=QUERY_ROOM
        )
        self.shape = Shape(s.fps, s.chunk_seconds, s.frames_per_round, *size)
        check_memory(self.spec, device_bytes(self.checkpoint.shapes), self.checkpoint.dtype, streams=config.places, mesh=config.mesh)
        self.shelf = Shelf(config.state, config.limits.kept_snapshots) if config.state else None
        self.metrics = Metrics()
        self.sessions = Sessions(config.places, config.limits, self.metrics, self._wake)
        self.scheduler: Scheduler | None = None
        self.model: LoadedModel | None = None
        self.failure = ""  # why it will never be ready
        self.name = self.checkpoint.config.name if config.model is None else Path(config.model).name
        stamp = self.checkpoint.weights
        self._print = fingerprint(self.spec, f"{self.checkpoint.nbytes} {self.checkpoint.dtype} {weights_stamp(stamp)}")
        self._stopping: Callable[[], object] = lambda: None
        self._thread: threading.Thread | None = None

    def _wake(self) -> None:
        if self.scheduler is not None:
            self.scheduler.wake()

    @property
    def ready(self) -> bool:
        return self.scheduler is not None and self.scheduler.ready and not self.sessions.draining

    @property
    def random(self) -> bool:
        """Whether the model has learnt nothing."""
        return random_weights(self.checkpoint.path) and not self.config.weights

    def start(self, stopping: Callable[[], object]) -> None:
        """Loads, compiles and then runs rounds, all in the device's thread. `stopping` is called there when that ends by itself."""
        self._stopping = stopping
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def rests(self, seconds: float) -> bool:
        """Whether the device's thread ends, or has ended, within that time. Blocks."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with Compilations() as compilations:
                self.metrics.compilations.set_function(lambda: compilations.count)
                self._serve()
        except UserError as error:
            self.failure = str(error)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._stopping()

    def _serve(self) -> None:
        """Loads and compiles, then runs rounds until the end."""
        kinds = [True, False] if self.spec.query_capacity else [False]
        programs = Programs(self.spec, self.checkpoint.shapes, self.checkpoint.dtype, kinds, streams=self.config.places)
        self.model = self.checkpoint.load()
        programs.wait("open_stream", "decode", *kinds)
        programs.check_memory("decode", *kinds)
        engine = Engine(self.model.params, self.spec, self.model.tokenizer, streams=self.config.places)
        self.metrics.state_bytes.set(tree_bytes(engine.state))
        self.scheduler = Scheduler(engine, self.sessions, self.metrics)
        self.scheduler.run()
        self.failure = self.scheduler.failure

    # Streams

    def open(self, wish: dict[str, Any], owner: str, offer: bytes = b"") -> Session:
        """Starts a stream as a client's JSON has it. Blocks (a name may be looked up). Raises Refused or UserError.

        `offer` is of a camera over WebRTC, which is the source then.
        """
        unknown = sorted(set(wish) - {"source", "clock", "pace", "query", "previous_text", "seed", "start", "duration", "name", "resume"})
        if unknown:
            raise Refused(f"there is no setting {unknown[0][:40]!r} of a stream")
        if "resume" in wish:
            return self.resume(check_text(wish["resume"], "resume", 64), owner, offer)
        settings = self._wish(wish)
        source = check_text(wish.get("source", "push"), "source", 2000)
        start, duration = _seconds(wish, "start") or 0.0, _seconds(wish, "duration")
        clock, pace = wish.get("clock"), wish.get("pace", "fast")
        if clock not in (None, "live", "file") or pace not in ("fast", "real"):
            raise Refused("clock is 'live' or 'file', pace is 'fast' or 'real'")
        origin: dict[str, Any] = {"source": source, "start": start, "pace": pace}
        if duration is not None:
            origin["end"] = start + duration
        if offer:
            kind, live = "webrtc", True
        elif source == "push":
            kind, live = "push", clock != "file"
        elif source == "sample":
            kind, live = "file", False
        elif is_url(source):
            self.config.allowed.url(source)
            live = is_live(source) if clock is None else clock == "live"
            kind = "live" if live else "url"
        else:
            self.config.allowed.file(source)
            kind, live = "file", False
        if kind == "file" and clock == "live":
            raise Refused("a file has clock 'file'; pace 'real' shows it at its own speed")
        origin["live"] = live
        name = check_text(wish.get("name", "" if source == "push" else shown(source)), "name", 100)
        session = Session(new_id(), settings, Journal(self.limits.history), owner=owner, kind=kind, name=name)
        session.origin = origin
        session.expected = start if live else None
        self.sessions.admit(session, lambda: self._source(session, start, offer), live=live)
        return session

    def _wish(self, wish: dict[str, Any]) -> Wish:
        """Texts and seed, checked against what the engine has room for."""
        query, text, seed = wish.get("query"), wish.get("previous_text"), wish.get("seed")
        if query is not None:
            self.check_query(query)
        if text is not None:
            check_text(text, "previous_text", self.limits.previous_text_characters)
            count, room = len(encode_words(self.checkpoint.tokenizer, text)), self.spec.cache.words_capacity
            if count > room:
                raise Refused(f"previous_text has {count} tokens and {room} fit: shorten it")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63):
            raise Refused("seed must be an integer of 64 bits")
        return Wish(query, text, seed)

    def check_query(self, query: Any) -> str:
        """A query that fits. Raises Refused."""
        check_text(query, "query", self.limits.text_characters)
        count = len(encode_query(self.checkpoint.tokenizer, query))
        if count > self.spec.query_capacity:
            raise Refused(f"query has {count} tokens and {self.spec.query_capacity} fit: shorten it")
        return query

    def ask(self, session: Session, text: Any) -> None:
        """A question for the next round. Raises Refused for one that does not fit."""
        question = " ".join(check_text(text, "a question", self.limits.text_characters).split())
        count, room = len(encode_query(self.checkpoint.tokenizer, question)), self.spec.stream.question_capacity
        if not question:
            raise Refused("a question must not be empty")
        if count > room:
            raise Refused(f"the question has {count} tokens and {room} fit: shorten it")
        session.ask(question, self.limits)
        self._wake()

    def _source(self, session: Session, begin: float, offer: bytes) -> Source:
        """Opens a session's video from second `begin` of the stream on."""
        assert self.scheduler is not None
        origin, grid = session.origin, self.scheduler.samples
        name = origin["source"]
        if session.kind == "webrtc":
            return PeerSource(offer, self.shape, self.limits, self._wake, grid=grid, start=begin)
        if name == "push":
            return PushedSource(self.shape, self.limits, self._wake, live=origin["live"], grid=grid, start=begin)
        if name != "sample" and not is_url(name):
            name = self.config.allowed.file(name)
        elif name == "sample":
            name = str(clip_path())
        if origin["live"]:
            return LiveSource(name, self.shape, self.limits, self._wake, session.journal.publish, grid=grid, start=begin)
        duration = origin["end"] - begin if "end" in origin else None
        if duration is not None and duration <= 0:
            raise Refused("the stream has ended: nothing of its video is left", status=409)
        return FileSource(name, self.shape, self.limits, self._wake, paced=origin["pace"] == "real", start=begin, duration=duration)

    # Snapshots

    def _capture(self, session: Session) -> Snapshot:
        """In the device's thread, between rounds."""
        assert self.scheduler is not None
        saved: SavedStream | None = session.saved
        if session.row is not None:
            saved = self.scheduler.engine.take(session.row)
        if saved is None:
            raise Refused("the stream has seen nothing yet: there is nothing to keep", status=409)
        return capture(session, saved)

    def snapshot(self, session: Session) -> bytes:
        """The stream as it is after its last round. Blocks. Raises Refused where nothing was seen yet, or the stream has ended."""
        if session.ended or self.scheduler is None:
            raise Refused("the stream has ended", status=409)
        return encode(self.scheduler.submit(lambda: self._capture(session)).result(60), self._print)

    def keep(self, session: Session) -> str:
        """Writes a snapshot to the server's folder, and gives its name. Blocks. Raises Refused."""
        if self.shelf is None:
            raise Refused("this server keeps no snapshots: start it with --state FOLDER, or fetch this one's", status=409)
        data = self.snapshot(session)
        try:
            self.shelf.write(session.id, data)
        except Refused:
            self.metrics.snapshots.labels("failed").inc()
            raise
        self.metrics.snapshots.labels("written").inc()
        log("stream.snapshot", stream=session.id, bytes=len(data), position=session.position)
        return session.id

    def store(self, data: bytes, owner: str) -> str:
        """Takes in a snapshot that another server made for the same key, checked, and gives its name. Raises Refused."""
        if self.shelf is None:
            raise Refused("this server keeps no snapshots: start it with --state FOLDER", status=409)
        snapshot = self._decode(data)
        if snapshot.about["owner"] != owner:
            raise Refused("this snapshot was made for another API key", status=403)
        self.shelf.write(snapshot.id, data)
        return snapshot.id

    def _decode(self, data: bytes) -> Snapshot:
        return decode(data, self.spec, self.checkpoint.dtype, self._print)

    @property
    def snapshot_bytes(self) -> int:
        """The most that a snapshot of this server can have."""
        return tree_bytes(self.scheduler.engine.state) // self.config.places + 512 * self.limits.history + (1 << 20) if self.scheduler else 0

    def resume(self, id: str, owner: str, offer: bytes = b"") -> Session:
        """Goes on with a stream from its snapshot: the same words as if it had never stopped. Blocks. Raises Refused."""
        if self.shelf is None:
            raise Refused("this server keeps no snapshots: start it with --state FOLDER", status=409)
        data = self._decode(self.shelf.read(id))
        about, last = data.about, data.last
        if about["owner"] != owner:
            raise Refused(f"there is no snapshot of {id}", status=404)
        if (about["kind"] == "webrtc") != bool(offer):
            raise Refused("a stream over WebRTC, and no other, goes on with an offer to /v1/whip?resume=ID", status=409)
        journal = Journal(self.limits.history, earlier=[event for event in data.events if event.type != "end"], first=last + 1)
        session = Session(data.id, data.wish, journal, owner=owner, kind=about["kind"], name=about["name"])
        session.origin, session.saved, session.position = about["origin"], data.saved, about["position"]
        session.rounds, session.spoken, session.tokens, session.skipped = (about[name] for name in ("rounds", "spoken", "tokens", "skipped"))
        session.questions.extend(about["questions"])
        if is_url(session.origin["source"]):
            self.config.allowed.url(session.origin["source"])
        begin = float(about["position"])
        session.expected = begin
        if about["live"]:  # the time in between has passed for the camera too
            away = data.taken.until(Moment.now())
            begin += math.floor(away / self.shape.chunk_seconds) * self.shape.chunk_seconds
            session.skip_reason = "moved"
        self.sessions.admit(session, lambda: self._source(session, begin, offer), live=about["live"])
        session.journal.publish("state", state="resumed", position=about["position"])
        return session

    # The end

    def drain(self) -> None:
        """No new streams; each stream is saved, where there is a folder for it, and told how to go on. Blocks."""
        self.sessions.draining = True
        for session in self.sessions.all():
            if session.ended:
                continue
            more: dict[str, Any] = {}
            if self.shelf is not None:
                with contextlib.suppress(UserError, TimeoutError):
                    more["resume"] = self.keep(session)
            self.sessions.end(session, "drain", "the server stops", **more)
        if self.scheduler is not None:
            self.scheduler.stop()

    async def keep_all(self) -> None:
        """Every `snapshot_seconds`, all streams that have moved on; and the end of what is no longer needed."""
        kept: dict[str, int] = {}
        while True:
            await asyncio.sleep(self.config.snapshot_seconds or 1.0)
            for session in self.sessions.all():
                if session.ended and session.id in kept:
                    del kept[session.id]
                    if self.shelf is not None and not self.sessions.draining:
                        self.shelf.remove(session.id)
                elif self.config.snapshot_seconds and not session.ended and session.rounds != kept.get(session.id, 0):
                    try:
                        await asyncio.to_thread(self.keep, session)
                        kept[session.id] = session.rounds
                    except UserError as error:
                        log("stream.snapshot_failed", stream=session.id, message=str(error))


def wish_of(params: Mapping[str, str], settings: Container[str]) -> dict[str, Any]:
    """A stream's settings from an address, where all are texts but the seed."""
    wish: dict[str, Any] = {name: value for name, value in params.items() if name in settings}
    if "seed" in wish:
        wish["seed"] = int(wish["seed"]) if wish["seed"].lstrip("-").isdecimal() else wish["seed"]
    return wish


def weights_stamp(folder: Place) -> str:
    """Of the weight files, which no snapshot may outlive: their names and sizes."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")]
    return " ".join(sorted(f"{path.name}:{size_of(path)}" for path in files))


def _seconds(wish: dict[str, Any], name: str) -> float | None:
    value = wish.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Refused(f"{name} must be a number of seconds")
    return float(value)
