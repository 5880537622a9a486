"""Cameras over WebRTC: the process that they send to, without a server around it. `tests/test_serving.py` has the route."""

import time

import pytest

pytest.importorskip("aiortc", reason="aiortc is not installed: pip install 'svlm-jax[webrtc]'")

from camera import Pictures, film

from svlm_jax.errors import UserError
from svlm_jax.serving.limits import Limits
from svlm_jax.serving.pushed import PeerSource
from svlm_jax.serving.sources import Grid, Shape

SHAPE = Shape(fps=2.0, chunk_seconds=1.0, frames=2, height=28, width=56)


class Watched:
    """The source of the camera that is answered."""

    def __init__(self, **limits: int):
        self.limits, self.rounds = Limits(**limits), []

    def answer(self, offer: str) -> str:
        self.source = PeerSource(offer.encode(), SHAPE, self.limits, lambda: None, grid=Grid(time.monotonic(), 1.0))
        return self.source.answer(60)

    def saw(self, count: int) -> bool:
        if self.source.ready():
            self.rounds.append(self.source.take())
        return len(self.rounds) >= count

    def wait_for_its_end(self) -> None:
        end = time.monotonic() + 30
        while not self.source.ended:
            self.source.take()
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_camera_that_leaves_is_a_stream_that_ends():
    watched = Watched()
    assert film(watched.answer, lambda: watched.saw(2)) == "connected"
    first, second = watched.rounds
    assert first.frames.shape == (2, 3, 28, 56) and second.start == first.start + 1 and (first.frames != second.frames).any()
    assert watched.source.counts.received <= 30  # of 60: what comes above the rate that is looked at is not even resized
    watched.wait_for_its_end()
    assert watched.source.failure == "" and not watched.source._peer.alive


def test_pictures_that_are_too_large_end_the_stream():
    watched = Watched(frame_pixels=64 * 64)
    film(watched.answer, lambda: watched.source.ended, Pictures(96, 96))
    assert "96 x 96 pixels is too large: 4,096 pixels are the most" in watched.source.failure


def test_a_process_that_dies_takes_nothing_with_it():
    watched = Watched()

    def killed() -> bool:
        if watched.saw(1):
            watched.source._peer._process.kill()
        return watched.source.ended

    film(watched.answer, killed)
    assert "ended by signal 9" in watched.source.failure


@pytest.mark.parametrize("offer", ["", "v=0\r\n", "\0" * 900, "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=video 9 UDP/TLS/RTP/SAVPF 0\r\n"])
def test_offers_that_are_refused(offer):
    with pytest.raises(UserError, match="offer"):
        Watched().answer(offer)
