"""Runs of train.py: killed, told to end, gone on with; their settings, and what they write down."""

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import packed
import pytest
import small_training

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import kills
from bucket_server import BucketServer
from kills import checkpoints, course, kill_in_a_save, records, resumed_after

from svlm_jax.checkpoints.load import load
from svlm_jax.configs.sft_tiny import annotations
from svlm_jax.configs.sft_tiny import config as sft_tiny
from svlm_jax.data.batch import IGNORED
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError
from svlm_jax.training import hosts
from svlm_jax.training.checkpoint import restore_params
from svlm_jax.training.config import HostsConfig, MeshConfig, as_json, override, resolve
from svlm_jax.training.flops import operations

STEPS = 8


def start(out: Path, *overrides: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """The tiny preset, saved at every second step."""
    return kills.start(out, f"steps={STEPS}", "checkpoint.every=2", *overrides, environment=environment)


def asked(count: int) -> list[str]:
    """The settings of `count` processes that train as one."""
    with socket.socket() as port:
        port.bind(("localhost", 0))
        address = f"localhost:{port.getsockname()[1]}"
    return [f"hosts.count={count}", f"hosts.coordinator={address}"]


def held(out: Path) -> list[str]:
    """Held-out data: the preset's own, which is enough to see that nothing else changes."""
    return [f"evaluation.datasets.held.path={annotations(out.parent)}", "evaluation.every=3"]


def ended(*runs: subprocess.Popen) -> str:
    """What the first of these runs said, all having ended well."""
    told = [run.communicate(timeout=600)[1] for run in runs]
    assert not any(run.returncode for run in runs), told
    return told[0]


def wait_for(run: subprocess.Popen, out: Path, step: int) -> None:
    while run.poll() is None and not any(record["step"] >= step for record in records(out)):
        time.sleep(0.02)
    assert run.poll() is None, run.communicate()[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs, evaluated on the way."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    told = ended(start(out, "report.tensorboard=true", "profile_steps=3:5", *held(out)))
    assert [record["step"] for record in records(out) if "eval_loss" in record] == [3, 6, 8]
    assert list(course(out)) == list(range(1, STEPS + 1)) and "goodput" in told
    assert any((out / "tensorboard").iterdir())
    saved = json.loads((out / "config.json").read_text())
    assert saved["steps"] == STEPS and saved["checkpoint"]["every"] == 2
    planned = json.loads((out / "plan.json").read_text())
    sizes, needed = planned["bytes"], planned["bytes"].pop("needed")
    assert sizes["trained"] > 0 and sizes["moments"] > 2 * sizes["trained"] and sum(sizes.values()) <= needed
    assert planned["tokens_per_row"] == 256 and planned["operations"]["decoder"] > 0 and planned["compiler"]["operations"] > 0
    return out


def test_a_trace_has_the_steps_that_were_asked_for_and_speaks_as_the_source_does(whole):
    (file,) = whole.glob("profile/**/*.xplane.pb")
    events = [event for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [3, 4]
    for scope in ("jvp(vision)", "jvp(decoder)", "transpose(jvp(decoder))", "transpose(jvp(loss))", "optimizer"):
        assert f"jit(step)/{scope}/".encode() in file.read_bytes(), scope


def test_a_run_that_is_killed_and_one_told_to_end_go_on_bit_for_bit(whole):
    """These are not evaluated: that must change nothing."""
    parts = whole.with_name("parts")
    run = start(parts)
    assert kill_in_a_save(run, parts, 2, 0.0), run.communicate()[1]
    run.communicate()
    assert checkpoints(parts) == ([2], ["4.orbax-checkpoint-tmp"])  # one is half written
    run = start(parts)
    time.sleep(2)  # in its start
    run.kill()
    run.communicate()
    run = start(parts)
    wait_for(run, parts, 6)
    run.send_signal(signal.SIGTERM)
    told = ended(run)
    assert resumed_after(told) == 2
    last = records(parts)[-1]["step"]
    assert f"told to end at step {last}" in told
    told = ended(start(parts))
    assert resumed_after(told) == last and course(parts) == course(whole)
    assert records(parts)[-1]["spent"]["restarts"] > 0 and "restarts" in told

    ours, theirs = restore_params(whole / "checkpoints"), restore_params(parts / "checkpoints")
    assert set(ours) == {"text", "vision"} and ours["vision"]["blocks"][0]["qkv"].ndim == 4
    np.testing.assert_array_equal(ours["text"]["layers"]["qkv"], theirs["text"]["layers"]["qkv"])


def test_a_run_that_lives_in_a_bucket_is_killed_and_goes_on_bit_for_bit(whole, tmp_path):
    """Weights, annotations, video, checkpoints and all else; the bucket is served over HTTP. It is a run like any other there, and copied."""
    pytest.importorskip("gcsfs")
    with BucketServer() as server:
        objects = server.bucket.objects
        annotated = annotations(tmp_path).read_text().replace(str(sample_path()), "games/clip.mp4")
        server.bucket.put("data/a.jsonl", annotated.encode(), {})
        server.bucket.put("videos/games/clip.mp4", sample_path().read_bytes(), {})
        for file in tiny_path().iterdir():
            server.bucket.put(f"model/{file.name}", file.read_bytes(), {})
        places = ["path=gs://bucket/data/a.jsonl", "videos=gs://bucket/videos"]
        settings = ["out=gs://bucket/run", "weights=gs://bucket/model", *(f"data.datasets.sample.{place}" for place in places)]

        def begin() -> subprocess.Popen:
            return start(whole.with_name("away"), *settings, environment=server.environment)

        def told() -> list[int]:
            return [json.loads(line)["step"] for line in objects.get("run/metrics.jsonl", (0, b""))[1].splitlines()]

        run = begin()
        while run.poll() is None and 4 not in told():
            time.sleep(0.02)
        assert run.poll() is None, run.communicate()[1]
        run.kill()
        run.communicate()
        begun = {int(name.split("/")[2]) for name in objects if name.startswith("run/checkpoints/")}
        assert begun <= {2, 4}
        after = resumed_after(ended(begin()))
        assert after in (0, *begun)
        copy = tmp_path / "run"
        for name, (_, content) in list(objects.items()):
            if name.startswith("run/") and not name.endswith("/"):
                file = copy / name.removeprefix("run/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        with server.used_here():
            ours = load("gs://bucket/run").params
    assert course(copy) == course(whole) and checkpoints(copy)[0] == [6, 8]
    theirs = load(whole).params
    np.testing.assert_array_equal(ours["text"]["layers"][0]["qkv"], theirs["text"]["layers"][0]["qkv"])
    again = json.loads((copy / "config.json").read_text())
    assert again["out"] == "gs://bucket/run" and (copy / "plots.png").is_file()


def test_two_processes_compute_what_one_does_and_one_goes_on(whole):
    """One of the two is told to end in its start, and both do, at one step; and once more when they go on. They go on to the end then, and
    a single process takes the last steps again.
    """
    out = whole.with_name("two")

    def both() -> list[subprocess.Popen]:
        two = asked(2)
        return [start(out, *two, *held(out), f"hosts.index={index}") for index in range(2)]

    def written() -> int:
        return metrics.stat().st_mtime_ns if metrics.exists() else 0

    metrics, told, last = out / "metrics.jsonl", "", 0
    for _ in range(2):
        runs, before = both(), written()
        while written() == before and runs[1].poll() is None:  # it is written anew before the step is compiled
            time.sleep(0.02)
        runs[1].send_signal(signal.SIGTERM)
        told = ended(*runs)
        assert resumed_after(told) == last
        assert last < records(out)[-1]["step"] < 3  # before it is evaluated
        last = records(out)[-1]["step"]
        assert f"told to end at step {last}" in told and checkpoints(out)[0][-1] == last
    assert [line.split()[:2] for line in told.splitlines() if line[:7].strip() in ("0", "1")] == [["0", "1"], ["1", "1"]]  # processes, devices
    assert resumed_after(ended(*both())) == last
    compare(out, whole)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    assert resumed_after(ended(start(out, *held(out)))) == STEPS - 2
    compare(out, whole)


def compare(out: Path, whole: Path) -> None:
    """The course of a run against that of one process: sums are taken in another order, and all else is the same."""
    ours, theirs = course(out), course(whole)
    assert list(ours) == list(theirs)
    for step, (loss, norm, accuracy, labels) in theirs.items():
        np.testing.assert_allclose(ours[step][:2], (loss, norm), rtol=1e-5)
        assert ours[step][2:] == (pytest.approx(accuracy, abs=1.5 / labels), labels)
    exact = [[(record["tokens"], record["silence"], record.get("eval_labels")) for record in records(run)] for run in (out, whole)]
    assert exact[0] == exact[1]
    evaluated = [[record["eval_loss"] for record in records(run) if "eval_loss" in record] for run in (out, whole)]
    np.testing.assert_allclose(*evaluated, rtol=1e-5)


def test_fewer_processes_than_asked_for_say_so(tmp_path):
    run = start(tmp_path / "alone", *asked(2), "hosts.index=0", "hosts.timeout=3")
    told = run.communicate(timeout=300)[1]
    assert run.returncode == 1 and "svlm: 2 processes did not find each other within 3 s: start all of them" in told, told


def test_more_processes_than_asked_for_say_so(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"^hosts.count = 1, but 2 processes are here: start as many as asked, or ask for these$"):
        hosts.start(HostsConfig())


def test_settings_by_name(tmp_path):
    config = override(
        sft_tiny(),
        ["steps=7", "step.optimizer.learning_rate=2e-5", "mesh.tensor=4", "data.epochs=none", "step.frozen=vision.*,text.embedding"],
    )
    assert config.steps == 7 and config.step.optimizer.learning_rate == 2e-5 and config.mesh.tensor == 4
    assert config.step.frozen == ("vision.*", "text.embedding") and config.data.epochs is None
    assert override(config, ["data.datasets.more.path=a.jsonl", "data.datasets.more.videos=v"]).data.datasets["more"].videos == "v"
    assert json.loads(as_json(config))["step"]["optimizer"]["b1"] == 0.9
    file = tmp_path / "mine.py"
    file.write_text("from svlm_jax.configs.sft_tiny import config\n")
    assert resolve(str(file), ["steps=3"]).steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("step.optimizer.rate=1", "there is no setting 'rate' here: kind, learning_rate, warmup"),
        ("steps=many", "steps=many: a value of type int is wanted"),
        ("steps=1.5", "steps=1.5: a value of type int is wanted"),
        ("steps", "'steps' is no setting: write key=value"),
        ("steps.more=1", "there is no setting 'more' here"),
        ("remat=some", "remat 'some' is unknown"),
        ("profile_steps=3", "must be FIRST:LAST"),
        ("data.datasets.other.videos=v", "there is no data set 'other': begin with data.datasets.other.path=FILE"),
        ("step.optimizer.moments=int8", "moments 'int8' is unknown"),
        ("weights=", "model '8b' is unknown"),
    ],
)
def test_settings_that_cannot_be(change, message):
    config = dataclasses.replace(sft_tiny(), model="8b")
    with pytest.raises(UserError, match=message):
        override(config, [change])


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(UserError, match=r"no preset 'sft_8b' in configs: .*sft_tiny"):
        resolve("sft_8b", [])


def test_one_axis_of_a_mesh_takes_what_is_left():
    assert MeshConfig(data=2, tensor=2).sizes(16) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 2}
    with pytest.raises(UserError, match=r"does not make up the 6 devices"):
        MeshConfig(tensor=4).sizes(6)
    with pytest.raises(UserError, match=r"one alone may be -1"):
        MeshConfig(data=-1).sizes(6)


def test_operations_are_those_of_what_is_there():
    """Against every product and pair written out for one chunk, with its padding left out."""
    model = small_training.model()
    chunk = packed.chunk(4, (2, 56, 84), 6, seed=0)
    found = operations(model, packed.pack(model, [[chunk, chunk]], tokens=64, bins=1, windows=2), {"text.layers.qkv", "text.head"})
    t, v, n = model.text, model.vision, len(chunk.tokens)
    layer = sum(a * b for a, b in [(64, 2 * 4 * 16), (64, 4 * 16), (64, 128), (64, 128), (128, 64)])  # qkv, out, gate, up, down
    pairs = sum(1 for i in range(n) for j in range(i + 1))
    labels = int((chunk.labels != IGNORED).sum())
    assert found.decoder == 2 * 3 * 2 * n * 2 * layer
    assert found.attention == 2 * 3 * 2 * 4 * (4 * 16) * pairs
    assert found.head == 2 * 3 * 2 * labels * 64 * t.vocab_size
    patches = 4 * 6
    block = 4 * 32 * 32 + 3 * 32 * 64
    merger = 128 * 128 + 128 * 64
    attention = 4 * 32 * patches**2  # its one window is the whole grid
    assert found.vision == 2 * (2 * patches * (2 * block + v.patch_features * 32) + 2 * 6 * merger + 2 * attention)
    frozen = operations(model, packed.pack(model, [[chunk]], tokens=64, bins=1, windows=2), {"text.layers.qkv.lora_a"})
    assert frozen.decoder == found.decoder / 3 and frozen.attention == found.attention / 2
