"""The near end of a camera's WebRTC connection: mode "peer" of `svlm_jax.serving.decoder`, in a process of its own as all that decodes.

It is sent an offer, with its length before it, and says `I` with the answer, then `F` for each picture. It ends with the connection, or when
its input does. Nobody is asked for this machine's address (no STUN): the candidates are its own. aiortc is imported here alone.
"""

import asyncio
import json
import time
from typing import Any, BinaryIO

from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from svlm_jax.errors import UserError
from svlm_jax.serving.decoder import LENGTH, STAMP, fit, pixel_bytes, send

PARTING = 2.0  # seconds to say goodbye


def peer(out: BinaryIO, job: dict[str, Any], source: BinaryIO) -> None:
    """One connection, from the offer to its end. UserError for an offer that cannot be answered, and pictures that are too large."""
    offer = source.read(*LENGTH.unpack(source.read(LENGTH.size))).decode("utf-8", "replace")
    asyncio.run(_meet(out, job, source, offer))


async def _meet(out: BinaryIO, job: dict[str, Any], source: BinaryIO, offer: str) -> None:
    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    try:
        video = await _accept(connection, offer)
        send(out, b"I", json.dumps({"answer": connection.localDescription.sdp}).encode())
        ends = [asyncio.create_task(work) for work in (_show(video, out, job), _until_lost(connection), _until_closed(source))]
        done, waiting = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for task in done:
            task.result()
    finally:
        await asyncio.wait([asyncio.create_task(connection.close())], timeout=PARTING)


async def _accept(connection: RTCPeerConnection, offer: str) -> MediaStreamTrack:
    """The first video of an offer, which is answered; all else in it is declined."""
    tracks: list[MediaStreamTrack] = []
    connection.on("track", tracks.append)
    try:
        await connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        video = next((track for track in tracks if track.kind == "video"), None)
        if video is None:
            raise UserError("the offer sends no video")
        for transceiver in connection.getTransceivers():
            transceiver.direction = "recvonly" if transceiver.receiver.track is video else "inactive"
        await connection.setLocalDescription(await connection.createAnswer())
    except UserError:
        raise
    except Exception as error:  # what aiortc cannot read fails in many ways
        raise UserError(f"the offer cannot be answered ({type(error).__name__}: {str(error)[:100]})") from None
    return video


async def _show(video: MediaStreamTrack, out: BinaryIO, job: dict[str, Any]) -> None:
    """Reads every picture, and gives the newest, at twice the rate that is looked at; what comes while one is resized is left out."""
    size, period = (job["height"], job["width"]), 1 / job["fps"]
    due, giving = 0.0, None

    def give(picture: Any, now: float) -> None:
        frame = fit(picture.to_ndarray(format="rgb24"), size)
        send(out, b"F", STAMP.pack(now), pixel_bytes(frame.transpose(2, 0, 1)))

    while True:
        try:
            picture: Any = await video.recv()
        except MediaStreamError:  # its end
            return
        if picture.width * picture.height > job["max_pixels"]:
            raise UserError(f"a picture of {picture.width} x {picture.height} pixels is too large: {job['max_pixels']:,} pixels are the most")
        now = time.monotonic()
        if now >= due and (giving is None or giving.done()):
            if giving is not None:
                giving.result()
            due = max(due + period / 2, now)
            giving = asyncio.get_running_loop().run_in_executor(None, give, picture, now)


async def _until_lost(connection: RTCPeerConnection) -> None:
    lost = asyncio.Event()

    def look() -> None:
        if connection.connectionState in ("failed", "closed"):
            lost.set()

    connection.on("connectionstatechange", look)
    look()
    await lost.wait()
    if connection.connectionState == "failed":
        raise UserError("the camera cannot be reached over any of the ways that it offers (UDP): is there a network between the two?")


async def _until_closed(source: BinaryIO) -> None:
    """Until the server closes the pipe, or is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    await reader.read()
