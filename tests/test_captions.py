"""Caption files as strict readers see them: WebVTT through webvtt-py, SubRip through srt, JSON lines through json."""

import html
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import srt
import webvtt
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from svlm_jax.captions import Caption, CaptionFiles, clean, clock, open_caption_files
from svlm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".vtt", ".srt", ".jsonl")
NASTY = [
    "-->",
    "a --> b",
    "1:2:3 - > 1:2:3",
    "00:00:01,000 --> 00:00:02,000",
    "7",
    "a\n\nb",
    "a\r\rb",
    "<i>&lt;</i> & &amp;",
    "NOTE",
    "STYLE",
    "WEBVTT",
    "\ud800",
    "\ufeff",
    "\x85\u2028\u2029",
    "{\\an8}",
    "\x1b[31m",
    "\x00",
]


def seconds(time_stamp: str) -> float:
    hours, minutes, rest = time_stamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def read_vtt(path: Path) -> list[tuple[float, float, str]]:
    cues = webvtt.WebVTT.read(str(path), strict=True)
    return [(seconds(cue.start), seconds(cue.end), html.unescape(cue.text)) for cue in cues]


def read_srt(path: Path) -> list[tuple[float, float, str]]:
    cues = list(srt.parse(path.read_text("utf-8"), ignore_errors=False))
    assert [cue.index for cue in cues] == list(range(1, len(cues) + 1))
    assert all(not cue.proprietary for cue in cues)
    return [(cue.start / timedelta(seconds=1), cue.end / timedelta(seconds=1), cue.content) for cue in cues]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]  # splitlines: the strictest idea of a line


def write_all(folder: Path, captions: list[Caption]) -> list[Path]:
    paths = [folder / f"out{suffix}" for suffix in SUFFIXES]
    with open_caption_files(paths) as files:
        files.start()
        for caption in captions:
            files.write(caption)
    return paths


@pytest.mark.parametrize("text, silent", [("", True), (" \n", True), ("\x00\x1b", True), ("a", False), ("é", False)])
def test_silent(text, silent):
    assert Caption(0, 1, text).silent is silent


@pytest.mark.parametrize("start, end", [(-1, 1), (float("nan"), 1), (0, float("inf"))])
def test_times_that_are_no_times(start, end):
    with pytest.raises(ValueError):
        Caption(start, end, "a")


def test_exact_bytes(tmp_path):
    vtt, srt_, jsonl = write_all(
        tmp_path, [Caption(12, 13, " Goal & <b>"), Caption(13, 14, ""), Caption(362439.9996, 362439.9996, "日本 -->")]
    )
    assert vtt.read_bytes().decode() == (
        "WEBVTT\n\n00:00:12.000 --> 00:00:13.000\nGoal &amp; &lt;b&gt;\n\n100:40:40.000 --> 100:40:40.001\n日本 --&gt;\n\n"
    )
    assert srt_.read_bytes().decode() == "1\n00:00:12,000 --> 00:00:13,000\nGoal & <b>\n\n2\n100:40:40,000 --> 100:40:40,001\n日本 →\n\n"
    assert jsonl.read_bytes().decode() == (
        '{"type": "segment", "start": 12, "end": 13, "text": "Goal & <b>"}\n'
        '{"type": "silence", "start": 13, "end": 14, "text": ""}\n'
        '{"type": "segment", "start": 362440.0, "end": 362440.0, "text": "日本 -->"}\n'
    )


def test_nothing_said(tmp_path):
    vtt, srt_, jsonl = write_all(tmp_path, [Caption(0, 1, "")])
    assert read_vtt(vtt) == [] and read_srt(srt_) == [] and len(read_jsonl(jsonl)) == 1


times = st.floats(0, 1e7, allow_nan=False)
texts = st.one_of(st.text(st.characters(codec=None, exclude_categories=())), st.lists(st.sampled_from([*NASTY, "a", " "])).map(" ".join))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(times, times, texts), max_size=4))
@example([(i, i + 1, text) for i, text in enumerate(NASTY)])
def test_any_text_survives(tmp_path, rounds):
    captions = [Caption(*fields) for fields in rounds]
    vtt, srt_, jsonl = write_all(tmp_path, captions)
    said = [caption for caption in captions if not caption.silent]
    for cues in (read_vtt(vtt), read_srt(srt_)):
        assert len(cues) == len(said)
        for (start, end, _), caption in zip(cues, said, strict=True):
            assert start == pytest.approx(caption.start, rel=0, abs=6e-4) and end > start
            assert end == pytest.approx(max(caption.end, caption.start), rel=0, abs=2e-3)
    assert [text for *_, text in read_vtt(vtt)] == [clean(caption.text) for caption in said]
    for (*_, text), caption in zip(read_srt(srt_), said, strict=True):
        assert "-->" not in text
        assert text == clean(caption.text) or "→" in text
    lines = read_jsonl(jsonl)
    assert [line["text"] for line in lines] == [clean(caption.text) for caption in captions]
    assert [line["type"] for line in lines] == ["silence" if caption.silent else "segment" for caption in captions]
    assert [line["start"] for line in lines] == [round(caption.start, 3) for caption in captions]


@given(texts)
def test_clean_is_one_encodable_line_and_settled(text):
    words = clean(text)
    assert words.encode() == clean(words).encode()
    assert len(words.splitlines()) <= 1 and words == words.strip()


@pytest.mark.parametrize(
    "position, shown", [(0, "00:00:00"), (59.999, "00:00:59"), (3661, "01:01:01"), (360000, "100:00:00"), (-1, "00:00:00")]
)
def test_clock(position, shown):
    assert clock(position) == shown


# Paths, before any long work


def refused(*paths) -> str:
    with pytest.raises(UserError) as caught:
        open_caption_files(paths)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bad_paths(tmp_path):
    (tmp_path / "folder.vtt").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link.srt").symlink_to(tmp_path / "a.srt")
    for name in ("a.txt", "a", ".vtt", ""):
        assert all(suffix in refused(tmp_path / name if name else "") for suffix in SUFFIXES)
    assert "directory" in refused(tmp_path / "folder.vtt")
    assert "no directory" in refused(tmp_path / "missing" / "a.vtt")
    assert "Not a directory" in refused(tmp_path / "file" / "a.vtt")
    assert "too long" in refused(tmp_path / f"{'a' * 300}.vtt")
    assert "same file" in refused(tmp_path / "a.srt", tmp_path / "." / "a.srt")
    assert "same file" in refused(tmp_path / "a.srt", tmp_path / "link.srt")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.vtt", "link.srt"]


def test_same_file_by_a_hard_link(tmp_path):
    (tmp_path / "a.srt").write_text("")
    os.link(tmp_path / "a.srt", tmp_path / "b.srt")
    assert "same file" in refused(tmp_path / "a.srt", tmp_path / "b.srt")


@pytest.fixture
def ordinary_user():
    """root may write anywhere: give that up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def locked_folder():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders can't even be entered by another user
    (folder / "old.vtt").write_text("WEBVTT\n\n")
    (folder / "old.vtt").chmod(0o444)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_no_permission(locked_folder, ordinary_user):
    assert "no permission to create files" in refused(locked_folder / "new.vtt")
    assert "no permission to write to this file" in refused(locked_folder / "old.vtt")


def test_suffix_in_capitals(tmp_path):
    with open_caption_files([tmp_path / "A.VTT"]) as files:
        files.write(Caption(0, 1, "a"))
    assert read_vtt(tmp_path / "A.VTT") == [(0, 1, "a")]


# What is on disk, and when


def test_an_existing_file_survives_a_failed_start(tmp_path):
    path = tmp_path / "a.vtt"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_caption_files([path, tmp_path / "b.srt"]):
        raise RuntimeError("the model does not load")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.vtt"]


def test_no_file_is_emptied_unless_all_open(tmp_path):
    (tmp_path / "a.vtt").write_text("old")
    folder = tmp_path / "folder"
    folder.mkdir()
    with open_caption_files([tmp_path / "a.vtt", folder / "b.srt"]) as files:
        folder.rmdir()
        with pytest.raises(UserError, match=r"b\.srt"):
            files.start()
    assert (tmp_path / "a.vtt").read_text() == "old"


@pytest.mark.parametrize("old", ["", "x" * 1000])
def test_an_existing_file_is_replaced(tmp_path, old):
    for suffix in SUFFIXES:
        (tmp_path / f"out{suffix}").write_text(old)
    (tmp_path / "out.vtt").chmod(0o640)
    vtt, srt_, jsonl = write_all(tmp_path, [Caption(0, 1, "a")])
    assert len(read_vtt(vtt)) == len(read_srt(srt_)) == len(read_jsonl(jsonl)) == 1
    assert vtt.stat().st_mode & 0o777 == 0o640
    assert len(os.listdir(tmp_path)) == 3  # no drafts left


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.vtt").symlink_to(tmp_path / "real.vtt")
    with open_caption_files([tmp_path / "link.vtt"]) as files:
        files.write(Caption(0, 1, "a"))
    assert (tmp_path / "link.vtt").is_symlink() and read_vtt(tmp_path / "real.vtt")


def test_every_round_is_on_disk_at_once(tmp_path):
    paths = [tmp_path / f"out{suffix}" for suffix in SUFFIXES]
    with open_caption_files(paths) as files:
        files.start()
        assert paths[0].read_text() == "WEBVTT\n\n"
        for i in range(3):
            files.write(Caption(i, i + 1, f"round {i}"))
            assert len(read_vtt(paths[0])) == len(read_srt(paths[1])) == len(read_jsonl(paths[2])) == i + 1


def test_closed_files(tmp_path):
    files = open_caption_files([tmp_path / "a.srt"])
    files.close()
    files.close()
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError):
        files.write(Caption(0, 1, "a"))


def test_no_files_at_all():
    with open_caption_files([]) as files:
        files.write(Caption(0, 1, "a"))


WRITER = """
import sys
from svlm_jax.captions import Caption, open_caption_files
with open_caption_files(sys.argv[1:]) as files:
    i = 0
    while True:
        files.write(Caption(i, i + 1, f"round {i} " + "é" * (i % 50)))
        i += 1
        if i == 20: print("going", flush=True)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_kill_9_leaves_valid_files(tmp_path, attempt):
    paths = [tmp_path / f"out{suffix}" for suffix in SUFFIXES]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, *map(str, paths)], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"going\n"
        time.sleep(0.01 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    counts = [len(read_vtt(paths[0])), len(read_srt(paths[1])), len(read_jsonl(paths[2]))]
    assert min(counts) >= 20 and max(counts) - min(counts) <= 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_full_disk_from_the_start(tmp_path, suffix):
    full, good = tmp_path / f"full{suffix}", tmp_path / "good.srt"
    full.symlink_to("/dev/full")
    with open_caption_files([full, good]) as files, pytest.raises(UserError, match=rf"full\{suffix}: No space left on device") as caught:
        files.write(Caption(0, 1, "a"))
    assert "\n" not in str(caught.value)
    if suffix != ".vtt":  # the header of a .vtt fails before any file gets a round
        assert read_srt(good) == [(0, 1, "a")]


def fill(files: CaptionFiles, limit: int) -> UserError:
    """Writes rounds until a file reaches `limit` bytes, where the system cuts its write short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for i in range(1000):
            files.write(Caption(i, i + 1, f"round {i}"))
    except UserError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raise AssertionError("the limit was never reached")


@pytest.mark.parametrize("suffix, read", [(".vtt", read_vtt), (".srt", read_srt), (".jsonl", read_jsonl)])
@pytest.mark.parametrize("limit", [400, 401, 417])
def test_disk_fills_up_inside_a_cue(tmp_path, suffix, read, limit):
    path = tmp_path / f"out{suffix}"
    with open_caption_files([path]) as files:
        error = fill(files, limit)
        kept = read(path)
        assert 0 < len(kept) < 20 and limit - 80 < path.stat().st_size < limit
        assert str(error) == f"{path}: File too large; it keeps what was said up to {clock(len(kept))}"
        files.write(Caption(900, 901, "there is room again"))
    assert len(read(path)) == len(kept) + 1


def test_ctrl_c_inside_a_write_keeps_whole_cues(tmp_path, monkeypatch):
    path, write = tmp_path / "out.jsonl", os.write
    with open_caption_files([path]) as files:
        files.write(Caption(0, 1, "a"))
        for cut in (10, None):  # half a cue reached the file, then a whole one whose count was lost

            def interrupted(fd, data, cut=cut):
                write(fd, data[:cut])
                raise KeyboardInterrupt

            monkeypatch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                files.write(Caption(1, 2, "b"))
    assert [line["text"] for line in read_jsonl(path)] == ["a", "b"]
