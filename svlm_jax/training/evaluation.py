"""The model on samples that it is not trained on: one pass over held-out data, all processes in step, beside the training data."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from svlm_jax.data.batch import IGNORED, Batch
from svlm_jax.data.pipeline import DataConfig, make_batches
from svlm_jax.errors import UserError
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.training import hosts
from svlm_jax.training.config import RunConfig
from svlm_jax.training.step import Trainer, TrainState
from svlm_jax.training.turns import silence, turns_of
from svlm_jax.training.unigram import Unigram, count_labels


@dataclasses.dataclass(frozen=True)
class Tally:
    """Sums over some labels and turns; they add up over batches and processes."""

    labels: float = 0.0
    loss: float = 0.0  # nats
    right: float = 0.0  # labels that the largest logit names
    unigram: float = 0.0  # nats, of the baseline
    samples: float = 0.0
    silent: float = 0.0  # turns
    kept_silent: float = 0.0  # of these, where the pause is named first
    spoken: float = 0.0  # turns
    kept_speaking: float = 0.0  # of these, where anything but the pause is named first

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def record(self) -> dict[str, Any]:
        """As it is written down; None where there is nothing to take a share of."""

        def share(part: float, whole: float) -> float | None:
            return part / whole if whole else None

        return {
            "eval_loss": share(self.loss, self.labels),
            "eval_accuracy": share(self.right, self.labels),
            "eval_silence_accuracy": share(self.kept_silent, self.silent),
            "eval_speech_accuracy": share(self.kept_speaking, self.spoken),
            "eval_unigram_loss": share(self.unigram, self.labels),
            "eval_labels": int(self.labels),
            "eval_samples": int(self.samples),
        }


def tally(batch: Batch, losses: Any, named: Any, samples: int, pause: tuple[int, ...], unigram: Unigram) -> Tally:
    """Of a batch on the host and what the model makes of it, both of this process's rows."""
    labels = np.asarray(batch.labels)
    asked, turns = labels != IGNORED, turns_of(batch, pause)
    first = named[turns.rows, turns.firsts] == pause[0]
    return Tally(
        labels=float(asked.sum()),
        loss=float(losses[asked].astype(np.float64).sum()),
        right=float((named == labels)[asked].sum()),
        unigram=float(unigram.losses[labels[asked]].sum()),
        samples=float(samples),
        silent=float(turns.silent.sum()),
        kept_silent=float((first & turns.silent).sum()),
        spoken=float((~turns.silent).sum()),
        kept_speaking=float((~first & ~turns.silent).sum()),
    )


class Evaluator:
    """Evaluates states of one trainer on the held-out data of a run; compiled once."""

    def __init__(self, trainer: Trainer, config: RunConfig, tokenizer: Tokenizer, shard: tuple[int, int]):
        held = config.evaluation
        datasets = {name: dataclasses.replace(dataset, weight=None) for name, dataset in held.datasets.items()}
        self.data: DataConfig = dataclasses.replace(config.data, datasets=datasets, epochs=1, shuffle=False)
        self._every, self._steps = held.every, config.steps
        self._trainer, self._pause = trainer, silence(tokenizer)
        self._go: Callable[[TrainState, Batch], tuple[Any, Any]] | None = None
        vision = trainer.model.vision
        self._batches = make_batches(
            self.data, tokenizer, vision, shard=shard, workers=config.workers, go_on=shard[1] > 1, at_most=held.rows or None
        )
        self._unigram = Unigram.of(count_labels(config.data, tokenizer, vision, trainer.model.text.vocab_size))

    @classmethod
    def of(cls, trainer: Trainer, config: RunConfig, tokenizer: Tokenizer, shard: tuple[int, int]) -> "Evaluator | None":
        """None where no held-out data are given. UserError where they are asked to be used all the same."""
        if not config.evaluation.datasets:
            if config.evaluation.every or config.evaluation.rows:
                raise UserError("evaluation.every and .rows are given without data: add evaluation.datasets.NAME.path=FILE, or leave them out")
            return None
        return cls(trainer, config, tokenizer, shard)

    def due(self, step: int) -> bool:
        return step == self._steps or (bool(self._every) and step % self._every == 0)

    def __call__(self, state: TrainState, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """The record of `state`, the same in all processes; None where they are told to end (`hosts.Ending`, asked by all before each batch)."""
        start, total, source = time.perf_counter(), Tally(), iter(self._batches)
        try:
            while True:
                rows = next(source, None)
                samples = 0 if rows is None else sum(map(len, rows.samples))
                told, left = hosts.totals(stop(), samples)
                if told:
                    return None
                if not left:
                    break
                assert rows is not None  # with several processes, all go on until none has a sample
                batch = hosts.put(rows.batch, self._trainer.recipe.placement)
                if self._go is None:
                    self._go = self._trainer.evaluated(batch)
                losses, named = (hosts.own_rows(array) for array in self._go(state, batch))
                total += tally(rows.batch, losses, named, samples, self._pause, self._unigram)
        finally:
            source.close()
        copies = hosts.copies(self._trainer.recipe.placement.mesh)  # type: ignore[arg-type]
        whole = Tally(*hosts.totals(*(number / copies for number in dataclasses.astuple(total))))
        return whole.record() | {"eval_seconds": time.perf_counter() - start}
