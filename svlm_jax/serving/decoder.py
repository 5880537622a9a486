"""The process that decodes what came from outside, so that a picture made to crash or fill a decoder takes nothing else with it.

    python -m svlm_jax.serving.decoder JSON      one source; it ends with its parent, whose pipes it reads and writes

Messages are a kind, the length of what follows, and that: `I` JSON about the source, `R` a round, `F` a picture, `E` what went wrong,
`D` the end. In mode "pictures" it says `I` once it is there, is sent pictures, each with its length before it, and answers each with
`F` or `E`. Mode "peer" is `svlm_jax.serving.peer`.
"""

import contextlib
import io
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from svlm_jax.data.resize import FACTOR, resize
from svlm_jax.errors import UserError

MESSAGE = struct.Struct("!cI")  # kind, bytes that follow
ROUND = struct.Struct("!IddI")  # index, start and end in seconds, broken pieces
STAMP = struct.Struct("!d")  # seconds of the machine's monotonic clock
LENGTH = struct.Struct("!I")
PICTURES = ("JPEG", "PNG", "WEBP")
LATE, SETTLED = 1.0, 10.0  # seconds behind its own clock at which a live picture is dropped, and after which the clock is set anew
LEAP = 5.0  # seconds ahead of its own clock, which was set forward then
# Containers of one video alone. Play lists, which name other files and addresses, are for URLs that are allowed and live.
FILE_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,h264,hevc,m4v,mpegvideo,gif,ivf,obu,dv,mxf,nut,y4m,yuv4mpegpipe"
FILE_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FILE_FORMATS}
HTTP_OPTIONS = {"protocol_whitelist": "http,https,httpproxy,tcp,tls", "format_whitelist": FILE_FORMATS, "max_redirects": "0"}
HLS_OPTIONS = {"protocol_whitelist": "http,https,httpproxy,tcp,tls,crypto", "format_whitelist": f"hls,{FILE_FORMATS}", "max_redirects": "0"}
RTSP_OPTIONS = {"rtsp_transport": "tcp", "fflags": "nobuffer", "protocol_whitelist": "rtsp,rtp,tcp,tls"}


def container_options(source: str) -> dict[str, str]:
    """Of libav, for a source: what it may open besides, which is nothing where that can be helped."""
    scheme, found, _ = source.partition("://")
    if not found:
        return FILE_OPTIONS
    if scheme in ("rtsp", "rtsps"):
        return RTSP_OPTIONS
    return HLS_OPTIONS if source.partition("?")[0].endswith(".m3u8") else HTTP_OPTIONS


def fit(frame: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The frame at `size` (height, width) in pixels, black at two sides where its shape is another: it is stretched by one token at most."""
    (height, width), scale = size, min(size[0] / frame.shape[0], size[1] / frame.shape[1])
    inner = [max(1, round(side * scale)) for side in frame.shape[:2]]
    inner = [whole if abs(whole - side) < FACTOR else side for whole, side in zip(size, inner, strict=True)]
    small = resize(frame, (inner[0], inner[1]))
    if small.shape[:2] == size:
        return small
    out = np.zeros((height, width, 3), np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    out[top : top + inner[0], left : left + inner[1]] = small
    return out


def open_picture(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """A still picture, upright. UserError for what is none, or larger than `max_pixels`, which its header says."""
    try:
        image = Image.open(io.BytesIO(data), formats=PICTURES)
        if image.width * image.height > max_pixels:
            raise UserError(f"a picture of {image.width} x {image.height} pixels is too large: {max_pixels:,} pixels are the most")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, struct.error) as error:
        raise UserError(f"not a picture that can be read ({str(error) or type(error).__name__}): send JPEG, PNG or WebP") from None


def clip_size(source: str, size: tuple[int, int]) -> tuple[dict[str, Any], tuple[int, int]]:
    """What a video says about itself, and the size it is decoded at: as `fit` has it, before black is added."""
    from svlm_jax.data.video import VideoReader

    with VideoReader(source, options=container_options(source)) as reader:
        info = reader.info
    scale = min(size[0] / info.height, size[1] / info.width)
    inner = [max(1, round(side * scale)) for side in (info.height, info.width)]
    inner = [whole if abs(whole - side) < FACTOR else side for whole, side in zip(size, inner, strict=True)]
    about = {"height": info.height, "width": info.width, "duration": info.duration, "frame_rate": info.frame_rate, "codec": info.codec}
    return about, (inner[0], inner[1])


def send(out: BinaryIO, kind: bytes, *parts: bytes | memoryview) -> None:
    out.write(MESSAGE.pack(kind, sum(len(part) for part in parts)))
    for part in parts:
        out.write(part)
    out.flush()


def pixel_bytes(frames: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(frames).reshape(-1).data)


def rounds(out: BinaryIO, job: dict[str, Any]) -> None:
    """A file's rounds, as fast as they are read."""
    from svlm_jax.data.video import read_rounds

    size = (job["height"], job["width"])
    about, inner = clip_size(job["source"], size)
    send(out, b"I", json.dumps(about).encode())
    how = {name: job[name] for name in ("fps", "chunk_seconds", "start", "duration")}
    for item in read_rounds(job["source"], size=inner, options=container_options(job["source"]), **how):
        frames = np.stack([fit(frame, size) for frame in item.frames]).transpose(0, 3, 1, 2)
        send(out, b"R", ROUND.pack(item.index, item.start, item.end, item.broken), pixel_bytes(frames))


def live(out: BinaryIO, job: dict[str, Any]) -> None:
    """A live source's pictures, each when it is due by the source's own clock, so many a second at most. Late ones are left out."""
    from svlm_jax.data.video import VideoReader

    size, period = (job["height"], job["width"]), 1 / job["fps"]
    with VideoReader(job["source"], options=container_options(job["source"])) as reader:
        info = reader.info
        send(out, b"I", json.dumps({"height": info.height, "width": info.width, "duration": None, "codec": info.codec}).encode())
        began, behind_since, due = time.monotonic(), None, 0.0
        for shown in reader.frames(Fraction(0)):
            ahead = began + float(shown.start) - time.monotonic()
            if ahead > LEAP:
                began -= ahead
            elif ahead > 0:
                time.sleep(ahead)
            elif ahead < -LATE:
                now = time.monotonic()
                behind_since = behind_since or now
                if now - behind_since > SETTLED:
                    began, behind_since = now - float(shown.start), None
                continue
            behind_since = None
            now = time.monotonic()
            if now >= due:
                due = max(due + period / 2, now)  # twice the rate that is looked at: the newest is never old
                frame = fit(np.rot90(shown.picture.to_ndarray(format="rgb24"), round(shown.picture.rotation / 90)), size)
                send(out, b"F", STAMP.pack(now), pixel_bytes(frame.transpose(2, 0, 1)))


def pictures(out: BinaryIO, job: dict[str, Any], source: BinaryIO) -> None:
    """Pictures as they are sent, in their order."""
    size = (job["height"], job["width"])
    send(out, b"I", b"{}")  # from here on pictures are timed
    while head := source.read(LENGTH.size):
        data = source.read(LENGTH.unpack(head)[0])
        try:
            frame = fit(open_picture(data, job["max_pixels"]), size)
        except UserError as error:
            send(out, b"E", str(error).encode())
        else:
            send(out, b"F", STAMP.pack(time.monotonic()), pixel_bytes(frame.transpose(2, 0, 1)))


def visual(out: BinaryIO, job: dict[str, Any]) -> None:
    """A picture or a short clip for a chat, whole, at the size that the model would choose for it."""
    from svlm_jax.data.resize import MIN_PIXELS, resized_size
    from svlm_jax.data.video import VideoReader, read_rounds

    rate = job["fps"]
    bounds = {"min_pixels": min(MIN_PIXELS, job["max_pixels"]), "max_pixels": job["max_pixels"]}
    if job["kind"] == "image":
        with open(job["source"], "rb") as file:
            pixels = open_picture(file.read(), job["frame_pixels"])
        frames = resize(pixels, resized_size(*pixels.shape[:2], **bounds))[None]
    else:
        options = container_options(job["source"])
        if job["spread"]:  # so many frames at most, over the whole clip
            with VideoReader(job["source"], options=options) as reader:
                rate = min(rate, job["spread"] / (reader.info.duration or 1 / rate))
        seconds = job["most_frames"] / rate
        how = {"fps": rate, "chunk_seconds": 1 / rate, "max_pixels": job["max_pixels"], "duration": seconds + 1 / rate}
        frames = np.concatenate([item.frames for item in read_rounds(job["source"], options=options, **how)])[: job["spread"]]
        if len(frames) > job["most_frames"]:
            raise UserError(f"the clip is longer than {seconds:g} s, which is the most in a chat: cut it, or start a stream")
    send(out, b"I", json.dumps({"frames": len(frames), "height": frames.shape[1], "width": frames.shape[2], "fps": rate}).encode())
    send(out, b"F", STAMP.pack(time.monotonic()), pixel_bytes(frames.transpose(0, 3, 1, 2)))


def meet(out: BinaryIO, job: dict[str, Any], source: BinaryIO) -> None:
    """A camera over WebRTC."""
    from svlm_jax.serving.peer import peer

    peer(out, job, source)


def confine(memory: int) -> None:
    """Bounds what a hostile file can take: memory, open files, a core dump on the disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def main() -> None:
    """The process. What goes wrong is told to the parent in one line; a parent that is gone ends it quietly."""
    job = json.loads(sys.argv[1])
    out, source = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # a library that prints must not come between the messages
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits on this system
        confine(job["memory"])
    work: dict[str, Callable[[], None]] = {
        "rounds": lambda: rounds(out, job),
        "live": lambda: live(out, job),
        "pictures": lambda: pictures(out, job, source),
        "visual": lambda: visual(out, job),
        "peer": lambda: meet(out, job, source),
    }
    try:
        try:
            work[job["mode"]]()
        except UserError as error:
            send(out, b"E", str(error).encode())
        except MemoryError:
            send(out, b"E", f"{job.get('source', 'a picture')}: decoding it takes more than {job['memory'] >> 20} MiB".encode())
        else:
            send(out, b"D")
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


if __name__ == "__main__":
    main()
