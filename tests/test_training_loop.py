"""The loop around the step: what it says of batches that are not taken in, and where it ends when it is told to."""

import dataclasses
import json
import os
import signal
from typing import Any

import jax
import numpy as np
import pytest
import small_training
from jax.experimental import multihost_utils

from svlm_jax.configs.sft_tiny import config as sft_tiny
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import Rows
from svlm_jax.errors import UserError
from svlm_jax.training import hosts
from svlm_jax.training.checkpoint import Checkpoints
from svlm_jax.training.config import CheckpointConfig
from svlm_jax.training.evaluation import Evaluator
from svlm_jax.training.loop import run
from svlm_jax.training.report import Report
from svlm_jax.training.step import Trainer

STEPS = 5
SAMPLES = tuple((f"match:{row}", f"match:{row + 4}") for row in range(4))


class Same:
    """The same batch again and again, in which more and more rows of the data could not be used."""

    def __init__(self) -> None:
        self.at = 0

    def __next__(self) -> Rows:
        self.at += 1
        return Rows(small_training.batch(), SAMPLES, {"match: video missing": self.at})

    def get_state(self) -> dict[str, Any]:
        return {"lanes": {"0": self.at}}

    def set_state(self, state: dict[str, Any]) -> None:
        self.at = state["lanes"]["0"]


@pytest.fixture(scope="module")
def made():
    """(trainer, its program)."""
    trainer = small_training.trainer(small_training.config(spike_window=2))
    return trainer, trainer.compiled(small_training.batch())


@pytest.fixture
def go(made, tmp_path, monkeypatch):
    """Runs all steps from a state; (why it ended, lines of metrics.jsonl, last checkpoint)."""
    trainer, program = made
    monkeypatch.setattr(Trainer, "compiled", lambda self, batch: program)

    def start(state, evaluator=None):
        data = dataclasses.replace(sft_tiny().data, rows=4, shape=RowShape(small_training.TOKENS, 2, 2))
        config = dataclasses.replace(sft_tiny(), out=str(tmp_path), data=data, steps=STEPS)
        checkpoints = Checkpoints.open(tmp_path / "checkpoints", CheckpointConfig(every=STEPS))
        report = Report(tmp_path / "metrics.jsonl", after=0, steps=STEPS)
        try:
            _, why = run(state, trainer, Same(), checkpoints, report, config, pause=(3, 4), evaluator=evaluator)
        finally:
            report.close()
            checkpoints.close()
        return why, [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()], checkpoints.latest

    return start


def test_a_spike_is_skipped_and_its_samples_are_named(made, go, capsys):
    state = small_training.start(made[0])
    calm = dataclasses.replace(state, history=jax.device_put(np.full(state.history.shape, 1e-3, np.float32), state.history.sharding))
    why, lines, saved = go(calm)
    assert why == "all steps are done" and saved == STEPS and all(line["skipped"] for line in lines)
    assert lines[0]["skipped_samples"] == [list(names) for names in SAMPLES]
    told = capsys.readouterr().err
    assert "step 1: a spike (loss" in told and all(", ".join(names) in told for names in SAMPLES)
    assert [line["rows_skipped"] for line in lines] == list(range(1, STEPS + 1))
    assert f"rows that could not be used: {STEPS} x match: video missing\n" in told
    fill = float(np.mean(np.asarray(small_training.batch().segments) != 0))
    assert lines[0]["row_fill"] == pytest.approx(fill)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_samples(made, go, tmp_path):
    state = small_training.start(made[0])
    broken = {**state.frozen, "vision.patch_embed": state.frozen["vision.patch_embed"] * np.nan}
    with pytest.raises(UserError, match=r"^step 1: loss or gradients are not finite, in samples match:0, match:4; match:1, match:5; "):
        go(dataclasses.replace(state, frozen=broken))
    assert not any((tmp_path / "checkpoints").iterdir())


class Interrupted(Evaluator):
    """Is due after step 2, and told to end while it is at work."""

    def __init__(self) -> None:
        pass

    def due(self, step: int) -> bool:
        return step == 2

    def __call__(self, state, stop):
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        return None if stop() else {}


def test_a_run_that_is_told_to_end_in_an_evaluation_saves_the_step_before_it(made, go):
    why, lines, saved = go(small_training.start(made[0]), Interrupted())
    assert why == "it was told to end at step 2" and saved == 2
    assert [line["step"] for line in lines] == [1, 2] and not any("skipped_samples" in line for line in lines)


def test_what_is_heard_before_the_first_step_ends_a_run_that_goes_on(monkeypatch):
    """JAX's service, having heard before anyone asked, says yes to the number 1 and to no other."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: number == 1)
    ending = hosts.Ending(lambda: False)
    assert ending() and ending()
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: number == 3)
    ending = hosts.Ending(lambda: False)
    assert [ending() for _ in range(5)] == [False, False, True, True, True]
