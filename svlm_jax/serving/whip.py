"""`/v1/whip`: cameras over WebRTC, in the way of WHIP (https://www.rfc-editor.org/rfc/rfc9725): an offer in, an answer out.

The resource that a client deletes to end it is the stream itself. Needs aiortc, which the extra `webrtc` brings.
"""

import asyncio
import importlib.util

from starlette.requests import Request
from starlette.responses import Response

from svlm_jax.errors import UserError
from svlm_jax.serving.guard import read_body
from svlm_jax.serving.limits import Refused
from svlm_jax.serving.pushed import PeerSource
from svlm_jax.serving.service import Service, wish_of

OFFER_BYTES = 64 * 1024
SETTINGS = {"query", "previous_text", "seed", "name", "resume"}  # of the address
KIND = "application/sdp"


class Whip:
    """The endpoint."""

    def __init__(self, service: Service):
        self.service = service

    async def offer(self, request: Request) -> Response:
        """201 with the answer, once it is known how the camera can send. Blocks no other request."""
        limits = self.service.limits
        if importlib.util.find_spec("aiortc") is None:
            raise Refused("this server has no WebRTC: pip install 'svlm-jax[webrtc]' where it runs, or push frames", status=501)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != KIND:
            raise Refused(f"an offer is expected, as {KIND}", status=415)
        body = await read_body(request, OFFER_BYTES, limits.body_seconds)
        if not body:
            raise Refused("the body must be an offer")
        wish = wish_of(request.query_params, SETTINGS)
        session = await asyncio.to_thread(self.service.open, wish, request.state.owner, body)
        assert isinstance(session.source, PeerSource)
        try:
            answer = await asyncio.to_thread(session.source.answer, limits.stall_seconds)
        except (UserError, TimeoutError) as error:
            why = str(error) or f"no answer was found within {limits.stall_seconds:g} s"
            await asyncio.to_thread(self.service.sessions.end, session, "error", why)
            raise Refused(why) from None
        return Response(answer, 201, {"Location": f"/v1/streams/{session.id}"}, media_type=KIND)
