"""serve.py as a person or a script runs it: a process, its output, its files, its exit code."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import av
import pytest
import srt
import webvtt

from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path

ROOT = Path(__file__).parent.parent
SERVE = [sys.executable, str(ROOT / "serve.py"), "--model", str(tiny_path())]  # quick; the bundled model's own tests are in test_bundle.py


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """The sample clip twenty times over: four minutes."""
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    with av.open(str(path), "w") as out, av.open(str(sample_path())) as clip:
        stream = out.add_stream_from_template(clip.streams.video[0])
        length = clip.streams.video[0].duration
        for turn in range(20):
            clip.seek(0)
            for packet in clip.demux(video=0):
                if packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts + turn * length, packet.dts + turn * length, stream
                    out.mux(packet)
    return path


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    outs = [folder / f"a{suffix}" for suffix in (".vtt", ".srt", ".jsonl")]
    done = subprocess.run([*SERVE, str(sample_path()), *(f"--out={out}" for out in outs)], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, *outs


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_video_is_captioned_to_its_end(sample_run):
    done, *_ = sample_run
    assert len(done.stdout.splitlines()) == 12 and done.stdout.startswith("[00:00:00] ")
    assert "The model tiny has random weights, so its words mean nothing" in done.stderr and "bundled" not in done.stderr
    assert "sample.mp4: 336x252 pixels at 2 fps, 108 tokens a round; streaming" in done.stderr
    assert "00:00:12 / 00:00:12  100%" in done.stderr and "real time" in done.stderr and "cache" in done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout + done.stderr


def test_all_formats_hold_the_same_words(sample_run):
    done, vtt, subrip, jsonl = sample_run
    rounds = lines_of(jsonl)
    assert [(r["type"], r["start"], r["end"]) for r in rounds] == [("segment", r, r + 1) for r in range(12)]
    words = [r["text"] for r in rounds]
    assert [cue.text for cue in webvtt.WebVTT.read(str(vtt), strict=True)] == words
    assert [cue.content for cue in srt.parse(subrip.read_text("utf-8"), ignore_errors=False)] == words
    assert [line.partition("] ")[2] for line in done.stdout.splitlines()] == words


def test_a_second_run_says_the_same(sample_run):
    done = subprocess.run(
        [sys.executable, "-m", "svlm_jax.cli", "caption", *SERVE[2:], str(sample_path())], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, sample_run[0].stdout)


def test_on_a_terminal(sample_run, tmp_path):
    """One stream, a status line that is redrawn in place, and never long without a sign of life."""
    leader, follower = pty.openpty()
    command, streams = [*SERVE, str(sample_path())], {"stdin": follower, "stdout": follower, "stderr": follower}
    process = subprocess.Popen(command, **streams, cwd=tmp_path, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    out, gaps, last = b"", [], time.monotonic()
    while select.select([leader], [], [], 120)[0]:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        now = time.monotonic()
        out, last = out + piece, (gaps.append(now - last), now)[1]
    os.close(leader)
    assert process.wait(30) == 0
    text = out.decode()
    assert "compiling" in text and "random weights" in text and "[####" in text and "ETA" in text
    assert all(word in text for word in sample_run[0].stdout.splitlines()[3].split()[1:])
    assert sorted(gaps)[-2] < 3  # Python itself starts in the longest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_said(long_video, tmp_path, number, code):
    vtt, jsonl = tmp_path / "a.vtt", tmp_path / "a.jsonl"
    command = [*SERVE, str(long_video), f"--out={vtt}", f"--out={jsonl}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        heard = [process.stdout.readline() for _ in range(5)]
        process.send_signal(number)
        start = time.monotonic()
        rest, err = process.communicate(timeout=60)
        assert time.monotonic() - start < 5
    assert process.returncode == code
    told = [line for line in err.splitlines() if line.startswith("svlm: ")]
    assert len(told) == 1 and told[0].startswith("svlm: stopped at 00:00:") and str(vtt) in told[0]
    assert "Traceback" not in err
    said = [line.partition("] ")[2] for line in "".join([*heard, rest]).splitlines()]
    kept = [r["text"] for r in lines_of(jsonl) if r["type"] == "segment"]
    assert len(said) >= 5 and kept[: len(said)] == said and len(kept) <= len(said) + 1
    assert [cue.text for cue in webvtt.WebVTT.read(str(vtt), strict=True)] == kept


def test_a_kill_keeps_what_was_said(long_video, tmp_path):
    vtt, subrip, jsonl = outs = [tmp_path / f"a{suffix}" for suffix in (".vtt", ".srt", ".jsonl")]
    command = [*SERVE, str(long_video), *(f"--out={out}" for out in outs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path) as process:
        heard = [process.stdout.readline() for _ in range(5)]
        process.kill()
        heard += process.communicate(timeout=60)[0].splitlines(keepends=True)
    said = [line.partition("] ")[2].rstrip("\n") for line in heard if line.endswith("\n")]
    kept = [r["text"] for r in lines_of(jsonl) if r["type"] == "segment"]
    cues = [cue.text for cue in webvtt.WebVTT.read(str(vtt), strict=True)]
    titles = [cue.content for cue in srt.parse(subrip.read_text("utf-8"), ignore_errors=False)]
    for words in (kept, cues, titles):  # the last round may have reached some of the files only
        assert len(said) <= len(words) <= len(said) + 1 and words[: len(said)] == said
    assert process.returncode == -signal.SIGKILL and not list(tmp_path.glob(".svlm-*"))


def test_ctrl_c_while_it_compiles_is_heard_at_once(tmp_path):
    command = [*SERVE, str(sample_path()), "--no-compilation-cache", "--out", str(tmp_path / "a.vtt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        for line in process.stderr:
            if line.startswith("compiling"):
                break
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 3
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "svlm: stopped at 00:00:00"
    assert not (tmp_path / "a.vtt").exists()


def test_a_reader_that_leaves_ends_it_quietly(long_video):
    with subprocess.Popen([*SERVE, str(long_video)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 141
    assert "Traceback" not in err and "Broken" not in err and "svlm: " not in err


def test_a_truncated_video_is_captioned_as_far_as_it_goes(tmp_path, sample_run):
    video, jsonl = tmp_path / "cut.mp4", tmp_path / "a.jsonl"
    video.write_bytes(sample_path().read_bytes()[:100_000])
    done = subprocess.run([*SERVE, str(video), "--out", str(jsonl)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(f"svlm: {video}: the video ends at ") and "states 12.0 s" in error
    texts = [r["text"] for r in lines_of(jsonl)]
    whole = [r["text"] for r in lines_of(sample_run[-1])]
    assert 3 <= len(texts) < 12 and texts[:-1] == whole[: len(texts) - 1]


@pytest.mark.parametrize("platform", ["cuda", "no_such_platform"])
def test_a_platform_that_is_not_there(platform):
    if platform == "cuda" and any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    done = subprocess.run(SERVE, capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": platform})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("svlm: JAX finds no device (") and platform in error and "unset JAX_PLATFORMS, or set it to cpu" in error


def test_a_wheel_holds_all_that_a_run_needs(tmp_path):
    """Built from a copy, as building leaves files behind."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        if name.split("/")[0] in ("svlm_jax", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE") and (ROOT / name).exists():
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tmp_path / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    inside = {name.replace("kernels/", "svlm_jax/kernels/", 1) if name.startswith("kernels/") else name for name in files}
    inside = {name.replace("configs/", "svlm_jax/configs/", 1) if name.startswith("configs/") else name for name in inside}
    expected = {name for name in inside if name.startswith("svlm_jax/") and name.endswith(".py")}
    model = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
    expected |= {f"svlm_jax/demo/{folder}/{name}" for folder in ("tiny", "commentator") for name in model}
    expected |= {f"svlm_jax/demo/{name}" for name in ("sample.mp4", "match.mp4", "match.jsonl", "commentator/streaming.json")}
    expected |= {f"svlm_jax/serving/page/{name}" for name in ("index.html", "style.css", "icon.svg", "main.js", "api.js", "sources.js")}
    expected |= {"svlm_jax/kernels/ring_attention/api.py", "svlm_jax/configs/models.py"}
    assert expected <= names
    assert not [name for name in names if not name.startswith(("svlm_jax/", "svlm_jax-"))]
