"""Held-out evaluation: what it measures, that it disturbs nothing, and that a model which learns is seen to."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import colours
import jax
import numpy as np
import pytest
import small
import small_training

from svlm_jax.data.annotations import AnnotationFile
from svlm_jax.data.batch import IGNORED
from svlm_jax.data.pipeline import DatasetConfig, make_batches
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import bind
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.training.config import EvaluationConfig
from svlm_jax.training.evaluation import Evaluator, Tally, tally
from svlm_jax.training.loss import plain_loss, targets_of, token_losses
from svlm_jax.training.turns import silence, turns_of
from svlm_jax.training.unigram import Unigram, count_labels

ROOT = Path(__file__).parent.parent


def test_the_loss_of_each_label_stands_where_the_label_does():
    config, batch = small_training.model(), small_training.batch()
    params = small_training.params()
    x = jax.random.normal(jax.random.key(1), (*batch.tokens.shape, config.text.hidden_size))
    text = bind(config, params).text
    logits = np.asarray(jax.jit(text.logits)(x), np.float64)
    targets, asked = map(np.asarray, targets_of(batch))
    rows, places = np.nonzero(asked)
    picked = logits[rows, places, targets[asked]] - np.log(np.exp(logits[rows, places]).sum(-1))
    for chunk in (7, 64):
        losses, named = map(np.asarray, jax.jit(lambda x, chunk=chunk: token_losses(text, x, batch, chunk=chunk))(x))
        np.testing.assert_allclose(losses[rows, places + 1], -picked, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(named[rows, places + 1], logits[rows, places].argmax(-1))
        assert (losses != 0).sum() == asked.sum()
    _, sums = plain_loss(text, x, batch)
    np.testing.assert_allclose(losses.sum(), sums.loss, rtol=1e-5)


def test_micro_batches_are_evaluated_as_the_whole():
    batch = small_training.batch()
    (losses, named), (again, same) = (
        trainer.evaluated(batch)(small_training.start(trainer), batch)
        for trainer in (small_training.trainer(small_training.config(accumulate=count)) for count in (1, 2))
    )
    np.testing.assert_allclose(again, losses, atol=1e-5)
    np.testing.assert_array_equal(np.where(batch.labels == IGNORED, 0, same), np.where(batch.labels == IGNORED, 0, named))


def data(folder: Path, **changes):
    """The pipeline's config over a few clips of colours."""
    file = colours.write(folder, "some", 12, seed=5, step=2)
    return dataclasses.replace(colours.config().data, datasets={"some": DatasetConfig(str(file))}, epochs=1, shuffle=False, **changes)


def test_turns_and_the_baseline_are_counted_from_the_annotations(tmp_path):
    config, tokenizer, vision = data(tmp_path), small.tokenizer(), small_training.model().vision
    pause = silence(tokenizer)
    assert pause == (tokenizer.encode_plain(" ...")[0], PromptLayout.from_tokenizer(tokenizer).im_end)
    clips = [AnnotationFile(config.datasets["some"].path).annotation(row) for row in range(5)]
    spoken = sum(len(clip.words) for clip in clips)  # a turn each
    silent = colours.CLIP * len(clips) - spoken
    assert silent > 0
    total, counts = Tally(), np.zeros(tokenizer.vocab_size, int)
    losses = Unigram.of(count_labels(config, tokenizer, vision, tokenizer.vocab_size))
    for rows in make_batches(config, tokenizer, vision):
        labels = np.asarray(rows.batch.labels)
        counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        named = np.where(labels == pause[0], pause[0], 0)  # right about every pause, wrong about all else
        turns = turns_of(rows.batch, pause)
        assert set(labels[turns.rows, turns.firsts - 1]) == {IGNORED} and turns.silent_labels == 2 * turns.silent.sum()
        total += tally(rows.batch, np.full(labels.shape, 0.5, np.float32), named, sum(map(len, rows.samples)), pause, losses)
    assert (total.samples, total.silent, total.spoken) == (5, silent, spoken)
    assert (total.labels, total.right) == (2 * silent + 3 * spoken, silent + spoken)
    found = total.record()
    assert found["eval_loss"] == 0.5 and found["eval_silence_accuracy"] == found["eval_speech_accuracy"] == 1.0
    np.testing.assert_array_equal(counts, count_labels(config, tokenizer, vision, tokenizer.vocab_size))
    seen = counts[counts > 0]
    share = (seen / (seen.sum() + len(seen))).clip(1e-9)
    np.testing.assert_allclose(found["eval_unigram_loss"], -(seen * np.log(share)).sum() / seen.sum())
    np.testing.assert_allclose(np.exp(-losses.losses).sum(), 1)
    assert Tally().record()["eval_loss"] is None


def test_a_part_of_the_rows_is_spread_over_all(tmp_path):
    for limit, wanted in ((2, [0, 3]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])):
        batches = make_batches(data(tmp_path), small.tokenizer(), small_training.model().vision, at_most=limit)
        assert sorted(name for rows in batches for row in rows.samples for name in row) == [f"some:{row}" for row in wanted]


def test_an_evaluation_without_data_is_refused():
    config = colours.config()
    made = small_training.trainer(small_training.config())
    with pytest.raises(UserError, match=r"^evaluation.every and .rows are given without data: add evaluation.datasets.NAME.path=FILE"):
        Evaluator.of(made, dataclasses.replace(config, evaluation=EvaluationConfig(every=5)), small.tokenizer(), (0, 1))
    assert Evaluator.of(made, dataclasses.replace(config, evaluation=EvaluationConfig()), small.tokenizer(), (0, 1)) is None


def test_a_model_that_learns_colours_knows_them_in_a_video_it_never_saw(tmp_path):
    """Colours follow each other at random, so nothing but the picture tells them: knowing how often each is said leaves 1.57 nats."""
    seen, unseen = colours.write(tmp_path, "seen", 60, seed=1, step=1), colours.write(tmp_path, "unseen", 40, seed=2, step=4)
    overrides = [f"out={tmp_path / 'run'}", f"data.datasets.seen.path={seen}", f"evaluation.datasets.unseen.path={unseen}"]
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "tests" / "colours.py"), *overrides]
    run = subprocess.run(command, env=dict(os.environ), stderr=subprocess.PIPE, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = colours.config().steps
    evaluated = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [10, 20, 30, 40] and len(records) == steps == 40
    first, last = evaluated[0], evaluated[-1]
    assert first["eval_loss"] > 0.5 and first["eval_unigram_loss"] == last["eval_unigram_loss"] > 1.4
    assert last["eval_loss"] < last["eval_unigram_loss"] - 1.2
    assert last["eval_accuracy"] > 0.9 and last["eval_silence_accuracy"] > 0.8 and last["eval_speech_accuracy"] > 0.9
    assert last["eval_samples"] == 10 and 0 < last["silence"] < 0.5
    assert f"held out {last['eval_loss']:.4f} (step {steps}; unigram {last['eval_unigram_loss']:.4f})" in run.stderr
