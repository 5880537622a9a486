"""Handing a frame from the wire to the stream that it belongs to."""

import asyncio

from svlm_jax.serving.limits import Limits, Refused
from svlm_jax.serving.pushed import PushedSource
from svlm_jax.serving.sessions import Session

WAIT = 0.02  # seconds between looks whether a frame has room


def pushable(session: Session) -> PushedSource:
    """The source of a stream that takes frames. Raises Refused for another."""
    source = session.source
    if session.kind != "push" or not isinstance(source, PushedSource):
        raise Refused("this stream reads its own source: frames are pushed into one with source 'push'", status=409)
    return source


async def push(source: PushedSource, data: bytes, seconds: float | None, limits: Limits) -> None:
    """Hands a frame over, after waiting for room where the stream's clock is the file's."""
    waited = 0.0
    while not source.has_room():
        await asyncio.sleep(WAIT)
        waited += WAIT
        if waited > limits.idle_seconds:
            raise Refused("the stream takes no more frames: is it paused?", status=503)
    source.push(data, seconds)
