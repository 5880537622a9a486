"""A video as rounds: the frames shown at exact sample times, decoded once, in order, within bounded memory.

Times are seconds from the video's first frame and are kept as fractions until they are handed out, so that 8 frames a second from a
29.97 Hz file never drift. libav's own log is off by default in PyAV and stays off: what goes wrong is raised here, in one line.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import av
import numpy as np
from av.error import ExitError, FFmpegError, InvalidDataError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from svlm_jax import storage
from svlm_jax.data.resize import FACTOR, MAX_PIXELS, MIN_PIXELS, check_size, resize, resized_size
from svlm_jax.errors import UserError

Item = TypeVar("Item")
Number = float | int  # runtime type checkers do not take an int for a float

SEEK_BACK = (0, 10, 60)  # seconds before the start to seek to, the next where one lands too late
UNINDEXED = ("mpeg", "mpegts")  # after a seek their times need a second to settle, so never seek right to the start
LEAP = 10  # seconds; a longer step of a broadcast's clock is a splice and no long frame (the threshold of ffmpeg's command line)
NETWORK_TIMEOUT = (10.0, 30.0)  # seconds to open a URL, and to wait for its next bytes
PYAV = int(av.__version__.split(".")[0])
LENIENT: dict[str, Any] = {} if PYAV >= 19 else {"metadata_errors": "replace"}  # by itself since 19, which no longer takes the argument
ONE_THREAD: dict[str, Any] = {"threads": 1} if PYAV >= 17 else {}  # of a conversion; before 17 it had no more
# before 17 a frame's own matrix was heeded only where another one was asked for, which means nothing for RGB
AS_TAGGED: dict[str, Any] = {} if PYAV >= 17 else {"dst_colorspace": "DEFAULT"}
LEAVE_BEHIND = 5.0  # seconds to wait for a reading thread that a stalled network keeps busy; it ends by itself later
TICK = Fraction(1, 1000)  # seconds; containers round the end of the last frame, by a millisecond in Matroska
BROKEN_READS = 64  # unreadable stretches in a row after which the file counts as ended
NOT_VIDEO = ("tty", "bin", "xbin", "adf", "idf")  # text files, which libav would draw as a terminal
STATES_DURATION = ("mov", "matroska", "avi", "asf", "flv")  # in other formats libav derives the duration from what is there


class TruncatedVideo(UserError):
    """The video ended before its container said it would. What was readable has been yielded."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video says about itself. Height and width are of the upright picture, in pixels."""

    source: str
    height: int
    width: int
    duration: float | None  # seconds; None where the container does not say
    frame_rate: float | None  # frames a second on average; None where unknown
    codec: str


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """One interval of video: frames[i] is what is shown at start + i / fps."""

    index: int  # counts from 0 at the requested start
    start: float  # seconds from the video's first frame
    end: float  # start + chunk_seconds, even where the video ends sooner
    frames: UInt8[np.ndarray, "F h w 3"]
    read_seconds: float = 0.0  # wall time that decoding and resizing took
    broken: int = 0  # unreadable packets and frames skipped on the way to this round


class _Shown(NamedTuple):
    """A decoded frame and the interval it is shown for, in seconds from the first frame."""

    start: Fraction
    end: Fraction
    picture: av.VideoFrame


class VideoReader:
    """One pass over the frames of a video in the order they are shown. `broken` counts what had to be skipped so far.

    Raises UserError on construction where there is nothing to read: a missing or unreadable file, no video stream, no decodable frame, or
    frames of an impossible size.
    """

    def __init__(self, source: str | os.PathLike, *, threads: int = 0, options: dict[str, str] | None = None):
        """`threads` decode; 0: as many as FFmpeg thinks fit. `options` are libav's, of container and protocol."""
        self.source, self._threads, self._options = os.fspath(source), threads, options or {}
        self.broken = 0
        self._open()

    def _open(self) -> None:
        self._file = _open_object(self.source) if storage.is_remote(self.source) else None
        self._container = _open_container(self.source, self._options, self._file)
        self._origin: Fraction | None = None  # the first frame's time on the stream's own clock
        self._last: _Shown | None = None
        self._read_to: dict[int, Fraction] = {}  # stream index: where its packets read so far end, on the stream's own clock
        self._failure = ""
        self.end = Fraction(0)  # where the last frame decoded so far ends, in seconds from the first frame
        try:
            self._stream = _video_stream(self._container, self.source, self._threads)
            self._base = self._stream.time_base or Fraction(1, 90_000)
            self._decoding = self._decode()
            first = next(self._decoding, None)
            if first is None:
                raise UserError(f"{self.source}: no frame of it can be decoded, the file is damaged: fetch or record it again")
            self._first = first
            self.info = self._describe()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        self._decoding.close()
        self._close()

    def _close(self) -> None:
        self._container.close()
        if self._file is not None:
            self._file.close()

    def frames(self, start: Fraction) -> Iterator[_Shown]:
        """Frames in shown order, the first of them at or before `start` (the very first frame where none is). To be called once."""
        sought = False
        for back in SEEK_BACK:
            target = start - (back or 3 * (self._container.format.name in UNINDEXED))
            if target <= self._first.end or not self._container.duration:  # raw streams lose their clock when they seek
                break
            try:
                self._container.seek(math.floor(((self._origin or 0) + target) / self._base), stream=self._stream)
            except FFmpegError:  # a pipe, or a stream without an index
                break
            sought, self._last = True, None
            self._decoding.close()
            self._decoding = self._decode()
            landed = next(self._decoding, None)
            if landed is not None and landed.start <= start:
                return itertools.chain([landed], self._decoding)
        if sought:
            self.__exit__()
            self._open()
        return itertools.chain([self._first], self._decoding)

    def shortfall(self) -> str:
        """After the last frame: why the file counts as cut off, or an empty string where it is whole."""
        end, origin = f"{float(self.end):.1f} s", self._origin or 0
        if self._failure:
            return f"reading failed at {end} ({self._failure})"
        period = self._last.end - self._last.start if self._last else 0
        slack = max(Fraction(1, 5), 2 * min(period, 1))
        if self._container.duration and self._read_to and self._container.format.name.startswith(STATES_DURATION):
            # over all streams: a sound track that goes on shows that the file is whole
            stated = Fraction((self._container.start_time or 0) + self._container.duration, av.time_base)
            if max(self._read_to.values()) < stated - slack:
                return f"the video ends at {end}, but its container states {float(stated - origin):.1f} s"
        readable = self._read_to.get(self._stream.index, origin) - origin
        if self.end < readable - slack:
            return f"nothing can be decoded after {end} of {float(readable):.1f} s"
        return f"the file breaks off at {end}" if _cut_off(self._container, self.source) else ""

    def _decode(self) -> Generator[_Shown, None, None]:
        """Frames from the current position on. Broken packets are skipped; `_failure` says why where reading stops before the end."""
        failures = 0
        while failures < BROKEN_READS:
            try:
                for packet in self._container.demux():  # of all streams, for `shortfall`; they are interleaved, so it costs nothing
                    failures = 0
                    stamp, index = packet.dts if packet.pts is None else packet.pts, packet.stream.index
                    if stamp is not None:
                        end = (stamp + (packet.duration or 0)) * Fraction(packet.time_base or self._base)
                        known = self._read_to.get(index)
                        self._read_to[index] = end if known is None else max(known, end)
                    if index == self._stream.index:
                        yield from self._decode_packet(packet)
                return
            except IndexError:  # PyAV trips over streams that appeared on the way (MPEG-TS), but only after the end of this one
                return
            except InvalidDataError:  # libav finds the next readable packet by itself when asked again
                failures += 1
                self.broken += 1
            except FFmpegError as error:
                self._failure = _reason(error)
                return
        self._failure = "damaged data"

    def _decode_packet(self, packet: av.Packet) -> Iterator[_Shown]:
        try:
            pictures = packet.decode()
        except FFmpegError:
            self.broken += 1
            return
        for picture in pictures:
            if picture.is_corrupt and self._origin is not None:  # the frame before it stays on screen
                self.broken += 1
            else:
                yield self._time(picture)

    def _time(self, picture: av.VideoFrame) -> _Shown:
        base = picture.time_base or self._base
        period = picture.duration * base if picture.duration else 1 / (_frame_rate(self._stream) or Fraction(25))
        last = self._last
        stamp = self.end if picture.pts is None else picture.pts * base  # raw streams may carry no times
        if self._origin is None:
            self._origin = stamp
        start = stamp - self._origin
        if last is not None:
            leap = self._container.format.name in UNINDEXED and start > last.end + LEAP
            if leap or start < last.start - 1:  # the clock was set: recordings joined end to end
                self._origin, start = stamp - last.end, last.end
                self._read_to.clear()
            start = max(start, last.start)
        self._last, self.end = _Shown(start, start + period, picture), start + period
        return self._last

    def _describe(self) -> VideoInfo:
        picture, stream, duration = self._first.picture, self._stream, self._container.duration
        height, width = picture.height, picture.width
        if round(picture.rotation / 90) % 2:
            height, width = width, height
        seconds = stream.duration * self._base if stream.duration else Fraction(duration, av.time_base) if duration else None
        rate = _frame_rate(stream)
        seconds, rate = (None if value is None else float(value) for value in (seconds, rate))
        return VideoInfo(self.source, height, width, seconds, rate, stream.codec_context.name)


def _reason(error: FFmpegError | OSError) -> str:
    if isinstance(error, InvalidDataError):
        return "it is not a video, or it is damaged or incomplete"
    if isinstance(error, ExitError):  # what PyAV makes of its timeouts
        return "no answer in time"
    return error.strerror or type(error).__name__


def _open_object(source: str) -> IO[bytes]:
    try:
        return storage.opened(source)
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such object: check the path") from None


def _open_container(source: str, options: dict[str, str], file: IO[bytes] | None):
    """The container of a path or URL, or of the open `file` of that name."""
    if not source:
        raise UserError("the video's name is empty: name a file or a URL")
    local = "://" not in source
    if local:
        path = Path(source)
        if not path.exists():
            raise UserError(f"{source}: there is no such file: check the path")
        if path.is_dir():
            raise UserError(f"{source} is a folder: name a video file in it")
        if path.is_file() and path.stat().st_size == 0:
            raise UserError(f"{source} is empty: fetch or record it again")
    try:
        # titles and the like come in any encoding; they are not used
        container = av.open(file or source, timeout=None if local or file else NETWORK_TIMEOUT, container_options=options, **LENIENT)
    except (FFmpegError, OSError) as error:
        raise UserError(f"{source} cannot be opened ({_reason(error)}): give a file that a video player can play") from None
    if container.format.name in NOT_VIDEO:
        container.close()
        raise UserError(f"{source} is not a video: give a file that a video player can play")
    return container


def _video_stream(container, source: str, threads: int):
    """The first video stream that is not cover art; checks the size that its header states before anything is allocated."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise UserError(f"{source} has no video stream (it holds {kinds}): give a file with pictures")
    stream = streams[0]
    codec = stream.codec_context
    if codec is None:
        raise UserError(f"{source}: its video codec is unknown, or its header is damaged: convert it to H.264, or fetch it again")
    check_size(source, codec.height, codec.width)
    stream.thread_type, codec.thread_count = "AUTO", threads  # frames in parallel, where the codec can
    return stream


def _frame_rate(stream) -> Fraction | None:
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate.numerator, rate.denominator) if rate else None  # since PyAV 19 a type of its own


def _cut_off(container, source: str) -> bool:
    """Whether the bytes themselves show that the end of a local file is missing."""
    if not os.path.isfile(source):
        return False
    size = os.path.getsize(source)
    if container.format.name == "mpegts":
        with open(source, "rb") as file:
            head = file.read(2 * 188)
        return head[0::188] == b"GG" and size % 188 != 0  # packets of 188 bytes, each begun by 0x47
    tails = [getattr(stream, "index_entries", ())[-64:] for stream in container.streams]  # absent before PyAV 17
    return any(entry.pos + entry.size > size for tail in tails for entry in tail)


def probe(source: str | os.PathLike) -> VideoInfo:
    """What a video says about itself; decodes one frame, so a file that passes can be read. Raises UserError as `VideoReader` does."""
    with VideoReader(source) as reader:
        return reader.info


def read_rounds(
    source: str | os.PathLike,
    *,
    fps: Number,
    chunk_seconds: Number,
    max_pixels: int = MAX_PIXELS,
    start: Number = 0.0,
    duration: Number | None = None,
    size: tuple[int, int] | None = None,
    factor: int = FACTOR,
    threads: int = 0,
    options: dict[str, str] | None = None,
) -> Iterator[Round]:
    """The rounds of a video. Round r shows frame i at t = start + r * chunk_seconds + i / fps: the last frame that begins at or before t.

    `start` and `duration` are in seconds; rounds that begin before start + duration are given. `size` (height, width) in pixels overrules
    the size that follows from `max_pixels`, whose sides are multiples of `factor`. The last round is given where the video covers its first
    sample, and repeats the last frame. So many `threads` decode (0: as many as FFmpeg thinks fit). `options` are libav's.
    The file is opened and checked at the call; decoding begins with the first round.

    Raises UserError at the call for an unusable file or setting, and while reading where `start` lies beyond the end; TruncatedVideo after
    the last readable round of a file that is cut off.
    """
    rate, chunk, begin = (_exact(name, value) for name, value in (("--fps", fps), ("--chunk", chunk_seconds), ("--start", start)))
    count = round(rate * chunk)
    if rate <= 0 or chunk <= 0 or count < 1 or abs(rate * chunk - count) > Fraction(1, 10**4):
        raise UserError(f"--fps {fps:g} x --chunk {chunk_seconds:g} must give a whole number of frames a round, at least 1")
    if begin < 0:
        raise UserError(f"--start must not be negative, but is {start:g}")
    stop = None if duration is None else begin + _exact("--duration", duration)
    if stop is not None and stop <= begin:
        raise UserError(f"--duration must be positive, not {duration:g}")
    if size is not None and min(size) < 1:
        raise UserError(f"a frame size of {size[1]} x {size[0]} pixels is impossible")
    reader = VideoReader(source, threads=threads, options=options)
    if size is None:
        limits = {"min_pixels": min(MIN_PIXELS, max_pixels), "max_pixels": max_pixels}
        size = resized_size(reader.info.height, reader.info.width, factor=factor, **limits)
    return _rounds(reader, size, [i / rate for i in range(count)], chunk, begin, stop)


def _exact(name: str, value: Number) -> Fraction:
    """The fraction meant by a float: 0.1 is a tenth, 1/3 a third."""
    if not math.isfinite(value):
        raise UserError(f"{name} must be a number, not {value}")
    return Fraction(value).limit_denominator(10**6)


def _rounds(
    reader: VideoReader, size: tuple[int, int], offsets: list[Fraction], chunk: Fraction, start: Fraction, stop: Fraction | None
) -> Iterator[Round]:
    with reader:
        screen, broken = None, 0
        for index in itertools.count():
            begin = start + index * chunk
            if stop is not None and begin >= stop:
                return
            clock = time.perf_counter()
            screen = screen or _Screen(reader, start, size)
            if not screen.lit(begin):
                break
            frames = np.stack([screen.at(begin + offset) for offset in offsets])
            skipped, broken = reader.broken - broken, reader.broken
            yield Round(index, float(begin), float(begin + chunk), frames, time.perf_counter() - clock, skipped)
        shortfall = reader.shortfall()
        if shortfall:
            raise TruncatedVideo(f"{reader.source}: {shortfall}: the file is incomplete or damaged, fetch or record it again")
        if index == 0:
            lasts = f"{reader.source} lasts {float(reader.end):.1f} s"
            raise UserError(f"{lasts}, so it cannot start at {float(start):g} s: give a smaller --start")


class _Screen:
    """What is shown at a time that only moves forward. A frame is converted and resized when it is asked for, and once."""

    def __init__(self, reader: VideoReader, start: Fraction, size: tuple[int, int]):
        self._source, self._size = reader.source, size
        self._converter = VideoReformatter()  # kept: to set one up takes longer than to convert a small frame
        self._frames = reader.frames(start)
        self._shown = next(self._frames)
        self._next = next(self._frames, None)
        self._pixels: UInt8[np.ndarray, "h w 3"] | None = None

    def _advance(self, when: Fraction) -> None:
        while self._next is not None and self._next.start <= when:
            self._shown, self._pixels = self._next, None
            self._next = next(self._frames, None)

    def lit(self, when: Fraction) -> bool:
        """Whether the video has not ended by then."""
        self._advance(when)
        return self._next is not None or when < self._shown.end - TICK

    def at(self, when: Fraction) -> UInt8[np.ndarray, "h w 3"]:
        self._advance(when)
        if self._pixels is None:
            picture = self._shown.picture
            try:
                pixels = self._converter.reformat(picture, format="rgb24", **ONE_THREAD, **AS_TAGGED).to_ndarray()
            except (FFmpegError, ValueError):
                raise UserError(f"{self._source}: pixel format {picture.format.name} cannot be shown: convert the video to H.264") from None
            self._pixels = resize(np.rot90(pixels, round(picture.rotation / 90)), self._size)  # both count anticlockwise
        return self._pixels


def read_ahead(iterator: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made by a thread that keeps at most `depth` of them ready (and one in the making).

    The thread starts with the first item asked for. An exception of `iterator` is raised here, after the items before it. Closing this
    generator, or dropping it, ends the thread once the item in the making is done, and closes `iterator` in the thread.
    """
    ready: queue.Queue = queue.Queue(max(1, depth))
    stopped = threading.Event()

    def work() -> None:
        error = None
        try:
            for item in iterator:
                ready.put((item, False, None))
                if stopped.is_set():
                    break
        except BaseException as caught:  # raised again in the thread that reads
            error = caught
        try:
            getattr(iterator, "close", lambda: None)()
        finally:
            if not stopped.is_set():
                ready.put((None, True, error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, last, error = ready.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        stopped.set()
        patience = time.monotonic() + LEAVE_BEHIND
        while thread.is_alive() and time.monotonic() < patience:  # empty the queue: the thread may be waiting for room in it
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)
