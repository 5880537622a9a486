"""Reading videos: which frame is shown when, on real files whose frames carry their number in their brightness."""

import math
import subprocess
import sys
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from svlm_jax.data import resize as resizing
from svlm_jax.data.video import Round, TruncatedVideo, probe, read_ahead, read_rounds
from svlm_jax.demo import clip
from svlm_jax.errors import UserError

SIDE = 56  # pixels of the test videos
SMALL = {"size": (28, 28)}


def numbered(number: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A frame whose left half shows number % 16 and whose right half number // 16, in 16 levels of grey."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2] = 8 + 16 * (number % 16)
    frame[:, width // 2 :] = 8 + 16 * (number // 16)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that `numbered` drew, from the lower rows (`noise` covers the upper ones) and away from the seam."""
    width, frame = frame.shape[1], frame[frame.shape[0] * 2 // 3 :]
    low, high = frame[:, : width // 4].mean(), frame[:, -(width // 4) :].mean()
    return round((low - 8) / 16) + 16 * round((high - 8) / 16)


def encode(path, stamps, *, codec="libx264", options=None, mux=None, draw=numbered, audio=0.0, noise=0, rate=25):
    """Writes frames shown at `stamps` (fractions of a second) and, if asked, `audio` seconds of silence."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=mux or {}) as container:
        base = Fraction(1, 12_800)
        stream = container.add_stream(codec, rate=rate)
        first = draw(0)
        stream.height, stream.width, stream.pix_fmt = first.shape[0], first.shape[1], "yuv420p"
        stream.codec_context.time_base = base if codec == "libx264" else Fraction(1, 25)
        stream.options = options or {"preset": "ultrafast", "crf": "8", "g": "20", "bf": "2"}
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for number, stamp in enumerate(stamps):
            pixels = draw(number)
            if noise:
                pixels[:noise] = rng.integers(0, 256, pixels[:noise].shape)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(stamp / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for number in range(int(audio * 8000 / 1024)):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts, silence.time_base = 8000, number * 1024, Fraction(1, 8000)
            container.mux(sound.encode(silence))
        if sound:
            container.mux(sound.encode(None))
    return path


def steady(count: int, rate: int | Fraction = 25) -> list[Fraction]:
    return [Fraction(i) / rate for i in range(count)]


def expected(stamps, start, fps, count) -> list[int]:
    times = [Fraction(start).limit_denominator(10**6) + i / Fraction(fps).limit_denominator(10**6) for i in range(count)]
    return [max([0] + [i for i, stamp in enumerate(stamps) if stamp - stamps[0] <= t]) for t in times]


def shown(rounds) -> list[int]:
    return [number_of(frame) for one in rounds for frame in one.frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def ten_seconds(folder):
    """250 frames at 25 Hz, the MP4 header first, with some noise so that the bytes spread evenly."""
    return encode(folder / "ten.mp4", steady(250), mux={"movflags": "+faststart"}, noise=12)


@pytest.mark.parametrize("fps, chunk", [(2, 1), (8, 1), (3, 1), (1, 1), (2, 0.5), (1, 3), (12.5, 0.4)])
def test_constant_rate(ten_seconds, fps, chunk):
    rounds = list(read_rounds(ten_seconds, fps=fps, chunk_seconds=chunk, **SMALL))
    count = round(fps * chunk)
    whole = -(-10 // Fraction(chunk).limit_denominator(1000))
    assert [r.index for r in rounds] == list(range(whole))
    assert rounds[0].frames.shape == (count, 28, 28, 3) and rounds[0].frames.dtype == np.uint8
    assert [(r.start, r.end) for r in rounds] == [(pytest.approx(i * chunk), pytest.approx((i + 1) * chunk)) for i in range(whole)]
    assert shown(rounds) == expected(steady(250), 0, fps, whole * count)
    assert all(r.read_seconds > 0 and r.broken == 0 for r in rounds)


@pytest.mark.parametrize("name, codec, options", [
    ("a.mp4", "libx264", None), ("a.mkv", "libx264", None), ("a.ts", "libx264", None), ("a.flv", "libx264", None),
    ("a.avi", "mpeg4", {"g": "12", "b": "4M"}), ("a.mpg", "mpeg2video", {"g": "12", "b": "4M", "bf": "2"}),
])  # fmt: skip
@pytest.mark.parametrize("start", [0.0, 0.1, 3.99, 6.02])
def test_start_in_every_container(folder, name, codec, options, start):
    path = folder / name
    if not path.exists():
        encode(path, steady(200), codec=codec, options=options)
    rounds = list(read_rounds(path, fps=5, chunk_seconds=1, start=start, duration=1.5, **SMALL))
    assert [r.start for r in rounds] == [start, pytest.approx(start + 1)]
    assert shown(rounds) == expected(steady(200), start, 5, 10)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
@pytest.mark.parametrize("fps, start", [(2, 0), (8, 0), (7, 2.35), (3, 4.7)])
def test_variable_rate(folder, name, fps, start):
    gaps = np.random.default_rng(3).choice([1, 1, 2, 3, 10, 45], size=120)
    stamps = [Fraction(int(n), 100) for n in np.cumsum(gaps)]  # the first frame is not at zero; the longest is shown for 0.45 s
    path = folder / name
    if not path.exists():
        encode(path, stamps)
    seconds = 3
    rounds = list(read_rounds(path, fps=fps, chunk_seconds=1, start=start, duration=seconds, **SMALL))
    assert shown(rounds) == expected(stamps, start, fps, seconds * fps)


@pytest.mark.parametrize("rate", [30, Fraction(30_000, 1001), 24])
def test_millisecond_clocks(folder, rate):
    """Matroska rounds times to milliseconds: what it states is what counts, and the rounded end is not a round too far."""
    path = encode(folder / f"r{float(rate):.0f}.mkv", steady(90, rate), rate=rate)
    rounds = list(read_rounds(path, fps=3, chunk_seconds=1, **SMALL))
    stated = [Fraction(math.floor(stamp * 1000 + Fraction(1, 2)), 1000) for stamp in steady(90, rate)]
    assert shown(rounds)[:9] == expected(stated, 0, 3, 9)
    assert len(rounds) == -(-90 // rate)


def test_partial_last_round_repeats_the_last_frame(folder):
    path = encode(folder / "short.mp4", steady(60))  # 2.4 s
    rounds = list(read_rounds(path, fps=4, chunk_seconds=1, **SMALL))
    assert shown(rounds[2:]) == [50, 56, 59, 59] and rounds[2].end == 3.0
    rounds = list(read_rounds(path, fps=4, chunk_seconds=1, start=1.4, **SMALL))
    assert [r.start for r in rounds] == [1.4]  # a round at 2.4 s would have nothing to show


def test_a_still_and_a_long_frame(folder):
    path = encode(folder / "one.mp4", steady(1))
    assert shown(read_rounds(path, fps=3, chunk_seconds=1, **SMALL)) == [0, 0, 0]
    path = encode(folder / "slow.mkv", [Fraction(0), Fraction(5), Fraction(11, 2)])
    assert shown(read_rounds(path, fps=1, chunk_seconds=1, **SMALL)) == [0, 0, 0, 0, 0, 1]


def test_edit_lists_shift_time_and_are_not_truncation(folder):
    """Frames before time zero make the muxer write an edit list that skips them."""
    path = encode(folder / "edit.mp4", [stamp - Fraction(1, 2) for stamp in steady(75)])
    rounds = list(read_rounds(path, fps=5, chunk_seconds=1, **SMALL))
    first = shown(rounds)[0]
    assert first in (0, 12, 13)  # players differ on whether to show the skipped frames
    assert np.all(np.diff(shown(rounds)[:10]) == 5)


def test_sound_longer_than_the_pictures_is_not_truncation(folder):
    for name in ("sound.mp4", "sound.mkv", "sound.ts"):
        path = encode(folder / name, steady(50), audio=5.0)
        assert len(list(read_rounds(path, fps=2, chunk_seconds=1, **SMALL))) == 2


def test_titles_in_any_encoding(folder, ten_seconds):
    data = ten_seconds.read_bytes()
    assert b"VideoHandler" in data
    (folder / "latin.mp4").write_bytes(data.replace(b"VideoHandler", b"Vid\xe9oHandler"))
    assert probe(folder / "latin.mp4").duration == 10


def test_joined_broadcasts_run_on(folder):
    """The second recording's clock starts lower than the first one's ends, the third's a quarter of an hour later."""
    parts = [
        encode(folder / f"part{i}.ts", [stamp + at for stamp in steady(count)])
        for i, (count, at) in enumerate([(75, 5), (50, 0), (50, 900)])
    ]
    (folder / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    rounds = list(read_rounds(folder / "joined.ts", fps=5, chunk_seconds=1, **SMALL))
    assert shown(rounds) == [5 * i for i in range(15)] + [5 * i for i in range(10)] * 2


def test_size_follows_max_pixels(folder):
    path = encode(folder / "wide.mp4", steady(3), draw=lambda i: numbered(i, 360, 640))
    (one,) = read_rounds(path, fps=2, chunk_seconds=1)
    assert one.frames.shape == (2, 364, 644, 3)
    (one,) = read_rounds(path, fps=2, chunk_seconds=1, max_pixels=100_000)
    assert one.frames.shape[1:3] == resizing.resized_size(360, 640, max_pixels=100_000)
    (one,) = read_rounds(path, fps=2, chunk_seconds=1, max_pixels=28 * 28 * 4)  # below the default minimum
    assert one.frames.shape[1] * one.frames.shape[2] <= 28 * 28 * 4
    info = probe(path)
    assert (info.height, info.width, info.codec, info.frame_rate) == (360, 640, "h264", 25.0)
    assert info.duration == pytest.approx(0.12, abs=0.001)


def test_rotated_video_is_shown_upright(folder):
    """A phone held upright stores a sideways picture and a matrix; here a quarter turn clockwise is patched into the track header."""

    def draw(_):
        frame = np.full((56, 112, 3), 20, np.uint8)
        frame[:28, :56] = 230  # the upper left quarter
        return frame

    path = encode(folder / "phone.mp4", steady(5), draw=draw)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    words = (0, 1, 0, -1, 0, 0, 112, 0, 0x4000)
    data[at : at + 36] = b"".join((w * 65536).to_bytes(4, "big", signed=True) for w in words)
    path.write_bytes(data)
    assert (probe(path).height, probe(path).width) == (112, 56)
    (one,) = read_rounds(path, fps=1, chunk_seconds=1, size=(112, 56))
    upright = one.frames[0].astype(int)
    assert upright[10, 45].min() > 200 and upright[10, 10].max() < 60 and upright[100, 45].max() < 60  # upper left went to the upper right


def test_high_definition_colours(folder):
    red = np.broadcast_to(np.array([200, 30, 40], np.uint8), (SIDE, SIDE, 3)).copy()
    path = folder / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "colorprim": "bt709"})
        stream.height = stream.width = SIDE
        stream.pix_fmt, stream.codec_context.colorspace = "yuv420p", 1  # BT.709
        frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (one,) = read_rounds(path, fps=1, chunk_seconds=1, **SMALL)
    assert np.abs(one.frames[0].astype(int) - red[0, 0]).max() <= 6


# what goes wrong


def one_line(error, *parts) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_unusable_files(folder, ten_seconds):
    cases = {
        "missing.mp4": (None, "no such file"),
        "empty.mp4": (b"", "empty"),
        "noise.mp4": (np.random.default_rng(0).bytes(20_000), "cannot be opened"),
        "words.txt": (b"not a video at all\n" * 50, "not a video"),
        "headless.mp4": (ten_seconds.read_bytes()[:600], "header"),
    }
    for name, (content, part) in cases.items():
        if content is not None:
            (folder / name).write_bytes(content)
        for act in (probe, lambda path: read_rounds(path, fps=2, chunk_seconds=1)):
            with pytest.raises(UserError) as error:
                act(folder / name)
            if part != "header":  # which of the messages a cut header gives is libav's business
                one_line(error, name, part)
    with pytest.raises(UserError) as error:
        probe(folder)
    one_line(error, str(folder), "folder")


def test_sound_alone(folder):
    path = folder / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        for number in range(20):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 8000, number * 1024
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    with pytest.raises(UserError) as error:
        read_rounds(path, fps=2, chunk_seconds=1)
    one_line(error, "sound.m4a", "no video stream", "audio")


@pytest.mark.parametrize("height, width, part", [(16, 64, "28 to"), (32, 8192, "too narrow")])
def test_impossible_sizes(folder, height, width, part):
    path = encode(folder / f"{width}.mkv", steady(1), draw=lambda i: numbered(i, height, width))
    with pytest.raises(UserError) as error:
        probe(path)
    one_line(error, path.name, part)


def test_settings(ten_seconds):
    good = {"fps": 2, "chunk_seconds": 1}
    odd = (
        {"fps": 0},
        {"fps": float("nan")},
        {"fps": 1.5},
        {"chunk_seconds": -1},
        {"start": -1},
        {"duration": 0},
        {"max_pixels": 9},
        {"size": (0, 5)},
    )
    for bad in odd:
        with pytest.raises(UserError):
            read_rounds(ten_seconds, **(good | bad))


@pytest.mark.parametrize("start", [10, 10.5, 4000])
def test_start_beyond_the_end(ten_seconds, start):
    with pytest.raises(UserError) as error:
        next(read_rounds(ten_seconds, fps=2, chunk_seconds=1, start=start))
    one_line(error, "ten.mp4", "lasts 10.0 s", "--start")
    assert not isinstance(error.value, TruncatedVideo)


@pytest.mark.parametrize("name, mux", [
    ("cut.mp4", {"movflags": "+faststart"}), ("fragments.mp4", {"movflags": "+frag_keyframe+empty_moov"}),
    ("cut.mkv", None), ("cut.ts", None),
])  # fmt: skip
@pytest.mark.parametrize("part", [0.4, 0.95])
def test_cut_off(folder, name, mux, part):
    path = folder / name
    whole = folder / f"whole-{name}"
    if not whole.exists():
        encode(whole, steady(150), mux=mux, noise=24)
        assert len(list(read_rounds(whole, fps=2, chunk_seconds=1, **SMALL))) == 6
    data = whole.read_bytes()
    cut = int(len(data) * part)
    path.write_bytes(data[: cut + (cut % 188 == 0)])
    seen = []
    with pytest.raises(TruncatedVideo) as error:
        seen.extend(read_rounds(path, fps=2, chunk_seconds=1, **SMALL))
    one_line(error, name, " s")
    assert 6 * part - 1.1 < len(seen) <= 6
    readable = shown(seen)
    assert readable[:-1] == expected(steady(150), 0, 2, len(readable))[:-1]  # the very last may repeat an earlier frame
    assert len(list(read_rounds(path, fps=2, chunk_seconds=1, duration=1, **SMALL))) == 1  # what was asked for is all there


@pytest.mark.parametrize("name", ["ten.mp4", "ten.mkv", "ten.ts"])
def test_damage_in_the_middle_is_skipped_and_counted(folder, ten_seconds, name, capfd):
    path = folder / name
    if not path.exists():
        encode(path, steady(250), noise=12)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(int(len(data) * 0.3), int(len(data) * 0.5), 12):
        data[at : at + 40] = rng.bytes(40)
    damaged = folder / f"damaged-{name}"
    damaged.write_bytes(data)
    rounds = list(read_rounds(damaged, fps=2, chunk_seconds=1, **SMALL))
    assert len(rounds) == 10 and sum(r.broken for r in rounds) > 0
    numbers, whole = shown(rounds), expected(steady(250), 0, 2, 20)
    assert numbers[:4] == whole[:4] and numbers[-6:] == whole[-6:]
    assert capfd.readouterr() == ("", "")


def test_frames_without_end_to_a_side(folder):
    Image.new("RGB", (17_000, 100)).save(folder / "huge.png")
    with pytest.raises(UserError) as error:
        probe(folder / "huge.png")
    one_line(error, "huge.png", "16384")


def test_nothing_to_decode(folder, ten_seconds):
    data = bytearray(ten_seconds.read_bytes())
    at = data.index(b"mdat") + 4
    data[at:] = bytes(len(data) - at)
    (folder / "blank.mp4").write_bytes(data)
    with pytest.raises(UserError) as error:
        probe(folder / "blank.mp4")
    one_line(error, "blank.mp4", "no frame")


# reading ahead


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "read-ahead"]


def test_read_ahead_gives_the_same(ten_seconds):
    plain = list(read_rounds(ten_seconds, fps=2, chunk_seconds=1, **SMALL))
    ahead = list(read_ahead(read_rounds(ten_seconds, fps=2, chunk_seconds=1, **SMALL)))
    assert shown(ahead) == shown(plain) and all(isinstance(r, Round) for r in ahead)
    assert not readers()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_read_ahead_is_bounded_and_closes(depth):
    made, closed = [], []

    def source():
        try:
            for i in range(10**9):
                made.append(i)
                yield i
        finally:
            closed.append(threading.current_thread().name)

    items = read_ahead(source(), depth)
    assert not readers()  # nothing starts before the first item is asked for
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) == depth + 2  # taken, waiting, and one that waits for room
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 0.5 and closed == ["read-ahead"] and not readers()


def test_read_ahead_passes_errors_on():
    def source():
        yield 1
        raise TruncatedVideo("cut")

    items = read_ahead(source())
    assert next(items) == 1
    with pytest.raises(TruncatedVideo, match="cut"):
        next(items)
    assert not readers() and list(items) == []


def test_read_ahead_stops_when_dropped():
    items = read_ahead(iter(range(10**9)))
    next(items)
    del items
    assert not readers()


# sizes, the clip, and what importing costs


def test_resized_size():
    assert resizing.resized_size(720, 1280) == (560, 1008)
    assert resizing.resized_size(1080, 1920) == (560, 1008)
    assert resizing.resized_size(252, 336) == (252, 336)
    assert resizing.resized_size(100, 100) == (280, 280)
    assert resizing.resized_size(42, 70, min_pixels=1) == (56, 56)  # ties go to the even multiple: 1.5 -> 2, 2.5 -> 2
    for height, width in [(30, 5000), (4000, 21), (999, 1001), (28, 28)]:
        h, w = resizing.resized_size(height, width)
        assert h % 28 == w % 28 == 0 and resizing.MIN_PIXELS <= h * w <= resizing.MAX_PIXELS
    for height, width in [(1, 201), (0, 10), (10, -1)]:
        with pytest.raises(UserError):
            resizing.resized_size(height, width)
    with pytest.raises(UserError):
        resizing.resized_size(100, 100, max_pixels=783)


def test_resize_is_antialiased():
    stripes = np.zeros((280, 280, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resizing.resize(stripes, (28, 28))
    assert small.shape == (28, 28, 3) and np.abs(small.astype(int) - 127).max() <= 5
    assert np.array_equal(resizing.resize(stripes, (280, 280)), stripes)


def test_sample_clip():
    info = probe(clip.sample_path())
    assert (info.height, info.width, info.duration, info.frame_rate) == (clip.HEIGHT, clip.WIDTH, clip.SECONDS, clip.FPS)
    assert clip.sample_path().stat().st_size < 300_000
    first, again = next(clip.frames()), next(clip.frames())
    assert np.array_equal(first, again) and not np.array_equal(first, next(clip.frames(seed=1)))
    stored = next(read_rounds(clip.sample_path(), fps=2, chunk_seconds=1)).frames
    assert stored.shape == (2, clip.HEIGHT, clip.WIDTH, 3)
    assert np.abs(stored[0].astype(int) - first).mean() < 4  # the bundled file is what the code draws


def test_import_needs_no_jax():
    code = "import sys, svlm_jax.data.video, svlm_jax.demo.clip; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
