"""A camera over WebRTC, for tests: aiortc's own peer connection, which sends a picture that changes."""

import asyncio
from collections.abc import Callable

import aiortc
import av
import numpy as np


class Pictures(aiortc.VideoStreamTrack):
    """30 a second, each of one grey."""

    def __init__(self, height: int = 84, width: int = 112):
        super().__init__()
        self.size, self.count = (height, width, 3), 0

    async def recv(self) -> av.VideoFrame:
        self.count += 1
        frame = av.VideoFrame.from_ndarray(np.full(self.size, 40 + 3 * self.count % 160, np.uint8), format="rgb24")
        frame.pts, frame.time_base = await self.next_timestamp()
        return frame


def film(answer: Callable[[str], str], until: Callable[[], bool], pictures: Pictures | None = None, seconds: float = 60.0) -> str:
    """Sends to whoever answers its offer, until something holds; gives the connection's last state before it is closed."""

    async def run() -> str:
        connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        try:
            connection.addTrack(pictures or Pictures())
            connection.addTransceiver("audio", direction="sendonly")
            await connection.setLocalDescription(await connection.createOffer())
            told = await asyncio.to_thread(answer, connection.localDescription.sdp)
            await connection.setRemoteDescription(aiortc.RTCSessionDescription(told, "answer"))
            async with asyncio.timeout(seconds):
                while not await asyncio.to_thread(until):
                    await asyncio.sleep(0.05)
            return connection.connectionState
        finally:
            await connection.close()

    return asyncio.run(run())
