"""What the server measures, in Prometheus' form. Series of a stream carry no label of it: how many there are must not grow for ever."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0)


class Metrics:
    """The series, by their names without the leading `svlm_`."""

    def __init__(self):
        self.registry = r = CollectorRegistry()
        self.places = Gauge("svlm_places", "Streams that can run at once", registry=r)
        self.streams = Gauge("svlm_streams", "Streams that have not ended", ["state"], registry=r)
        self.started = Counter("svlm_streams_started", "Streams that were admitted", ["source"], registry=r)
        self.ended = Counter("svlm_streams_ended", "Streams that ended", ["reason"], registry=r)
        self.refused = Counter("svlm_streams_refused", "Streams that were not admitted", ["reason"], registry=r)
        self.rounds = Counter("svlm_rounds", "Rounds of the engine", registry=r)
        self.captions = Counter("svlm_captions", "Rounds of streams", ["type"], registry=r)
        self.tokens = Counter("svlm_tokens", "Tokens that were sampled", registry=r)
        self.questions = Counter("svlm_questions", "Questions that were put to the model", registry=r)
        self.frames = Counter("svlm_frames", "Frames that reached a stream, and those of them that no round shows", ["fate"], registry=r)
        self.skipped = Counter("svlm_skipped_seconds", "Seconds of video that no round covers", ["reason"], registry=r)
        self.misses = Counter("svlm_deadline_misses", "Rounds that were not done when the next one was due", registry=r)
        self.parked = Counter("svlm_parked", "Times that a stream left its row because it had no round", registry=r)
        self.stage = Histogram("svlm_stage_seconds", "Time of a round's stages", ["stage"], buckets=SECONDS, registry=r)
        self.lag = Histogram("svlm_first_word_seconds", "From a live round's last frame to its first word", buckets=SECONDS, registry=r)
        self.fill = Gauge("svlm_cache_fill_ratio", "Share of the cache's slots in use, over open rows", registry=r)
        self.state_bytes = Gauge("svlm_state_bytes", "Memory of all streams' state", registry=r)
        self.snapshots = Counter("svlm_snapshots", "Snapshots", ["result"], registry=r)
        self.chats = Counter("svlm_chats", "Chat completions", ["result"], registry=r)
        self.compilations = Gauge("svlm_compilations", "Programs that were compiled since the start", registry=r)
        ProcessCollector(registry=r)  # memory, time and open files of the process, on Linux
        self.requests = Counter("svlm_http_requests", "Requests that were answered", ["status"], registry=r)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stage.labels(stage).observe(time.perf_counter() - began)

    def text(self) -> bytes:
        return generate_latest(self.registry)
