"""What a run tells of itself: lines, goodput over restarts, TensorBoard, Weights & Biases, plots."""

import dataclasses
import json
import struct
import sys
import time
import types

import pytest

from svlm_jax.configs.sft_tiny import config as sft_tiny
from svlm_jax.errors import UserError
from svlm_jax.training.config import ReportConfig, override
from svlm_jax.training.plots import plot
from svlm_jax.training.report import Report
from svlm_jax.training.sinks import numbers_of, open_sinks, require


def test_a_report_goes_on_behind_the_checkpoint(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    report = Report(file, after=2, steps=9)
    parts = {"decoder": 0.25, "attention": 0.125, "head": 0.0625, "vision": 0.0625}
    report.write({"step": 3, "loss": 1.5, "tokens_per_second": 1e4, "step_ms": 6e5, "data_wait": 0.25, "mfu": 0.5, "mfu_parts": parts})
    report.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    told = "step 3/9  loss 1.5000  10,000 tokens/s  data wait 25%  "
    told += "MFU 50.0% (decoder 25.0%, attention 12.5%, head 6.2%, vision 6.2%)  ETA 1:00:00\n"
    assert capsys.readouterr().err == told


def test_goodput_is_counted_over_restarts(tmp_path, monkeypatch):
    """A run of one minute, saved after step 1, killed after step 2, and started again ten seconds later."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    file = tmp_path / "metrics.jsonl"
    line = {"loss": 1.0, "tokens_per_second": 1.0, "step_ms": 1.0, "data_wait": 0.0, "mfu": None}

    def go(after, laps, steps):
        report = Report(file, after=after, steps=9, began=now[0])
        for kind, seconds, waited in laps:
            now[0] += seconds
            assert report.clock.lap(kind, waited=waited) == seconds
            if kind == "steps":
                report.write({"step": next(steps), **line})
        report.close()
        return report.clock

    first = go(0, [("start_up", 10, 0), ("compile", 20, 0), ("steps", 8, 3), ("saving", 2, 0), ("steps", 20, 0)], iter([1, 2]))
    assert first.spent == {"steps": 25, "data_wait": 3, "start_up": 10, "compile": 20, "saving": 2, "evaluation": 0, "restarts": 0}
    now[0] += 10
    second = go(1, [("start_up", 5, 0), ("evaluation", 1, 0), ("steps", 14, 0)], iter([2]))
    # Between the line that is kept and the new start: the saving, the step that is lost, and the pause
    assert second.spent == {"steps": 19, "data_wait": 3, "start_up": 15, "compile": 20, "saving": 0, "evaluation": 1, "restarts": 32}
    assert sum(second.spent.values()) == now[0] - 1000 and second.goodput == 19 / 90
    assert str(second).startswith("goodput 21.1% (steps 19.0 s, data wait 3.0 s, start up 15.0 s")
    third = go(0, [("start_up", 10, 0)], iter([]))  # nothing had been saved
    assert third.spent["restarts"] == 90 and third.goodput == 0
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == []


def scalars(folder):
    """(step, name, value) of every number in TensorBoard's files: records of a length, its checksum, the bytes and theirs."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            found += [(event.step, "purge", 0.0)] if event.session_log.status else []
    return found


LINE = {"step": 4, "loss": 0.5, "tokens_per_second": 8.0, "step_ms": 2.0, "data_wait": 0.0, "mfu": None, "mfu_parts": None, "flops": {"head": 3.0}}


def test_tensorboard_gets_every_number(tmp_path):
    config = override(sft_tiny(), ["report.tensorboard=true"])
    for after in (0, 3):
        report = Report(tmp_path / "metrics.jsonl", after=after, steps=9, sinks=open_sinks(config, tmp_path, after))
        report.write(LINE)
        report.close()
    found = scalars(tmp_path / "tensorboard")
    told = [(step, name, value) for step, name, value in found if name in ("loss", "flops/head", "spent/steps")]
    assert told == [(4, "loss", 0.5), (4, "flops/head", 3.0), (4, "spent/steps", 0.0)] * 2
    assert (4, "purge", 0.0) in found  # what was told of step 4 before the restart is void


def test_wandb_is_gone_on_with_after_a_restart(tmp_path, monkeypatch):
    told = []
    run = types.SimpleNamespace(
        define_metric=lambda *args, **kwargs: None, log=lambda numbers: told.append(numbers), finish=lambda: told.append("finished")
    )
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **settings: told.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = override(sft_tiny(), ["report.wandb=matches", "steps=9"])
    for after in (0, 3):
        (sink,) = open_sinks(config, tmp_path, after)
        sink.write(4, {"loss": 0.5})
        sink.close()
    first, numbers, finished, second, *_ = told
    assert (first["project"], first["resume"], first["config"]["steps"]) == ("matches", "allow", 9) and first["id"] == second["id"]
    assert numbers == {"loss": 0.5, "step": 4} and finished == "finished"


def test_what_is_not_installed_is_told_at_the_start(monkeypatch):
    for name, package, value in (("tensorboard", "tensorboardX", True), ("wandb", "wandb", "matches")):
        monkeypatch.setattr("importlib.util.find_spec", lambda asked, package=package: None if asked == package else object())
        with pytest.raises(UserError, match=rf"^report.{name} needs the package {package}: pip install 'svlm-jax\[{name}\]', or leave it out$"):
            require(dataclasses.replace(ReportConfig(), **{name: value}))
    require(ReportConfig())


def test_numbers_are_flat_and_finite():
    assert numbers_of({"a": 1, "b": {"c": 2.5, "d": None}, "e": True, "f": float("nan"), "g": "text"}) == {"a": 1.0, "b/c": 2.5, "e": 1.0}


def test_plots(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    spent = {"spent": {"steps": 3.0, "start_up": 1.0}, "goodput": 0.75}
    lines = [{"step": i, "loss": 1 / i, "accuracy": 0.5, "learning_rate": 1e-3, "tokens_per_second": 9.0, "data_wait": 0.0, **spent} for i in (1, 2)]
    lines[1] |= {"eval_loss": 0.7, "eval_unigram_loss": 2.0, "eval_accuracy": 0.5, "eval_silence_accuracy": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot(file, tmp_path / "plots.png") and (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot(file, tmp_path / "other.png") and not (tmp_path / "other.png").exists()
