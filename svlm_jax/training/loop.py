"""Step after step: data ahead of the device, checkpoints beside it, and an end that loses nothing."""

import contextlib
import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from svlm_jax.data.batch import PADDING
from svlm_jax.data.pipeline import Rows
from svlm_jax.errors import UserError
from svlm_jax.training import hosts
from svlm_jax.training.checkpoint import Checkpoints
from svlm_jax.training.config import RunConfig
from svlm_jax.training.evaluation import Evaluator
from svlm_jax.training.flops import Operations, operations, peak
from svlm_jax.training.report import Report
from svlm_jax.training.step import Metrics, Trainer, TrainState
from svlm_jax.training.turns import turns_of

TOLD = 8  # rows that a message names; those of a spike are all in its line of metrics.jsonl


@runtime_checkable
class Source(Protocol):
    """Batches in an order that can be gone back to: `grain.DatasetIterator`."""

    def __next__(self) -> Rows: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Taken:
    """A batch on its way through the device."""

    step: int  # batches taken, this one counted
    batch: Any  # on the devices
    place: dict[str, Any]  # in the data, behind this batch
    samples: tuple[tuple[str, ...], ...]
    totals: Callable[[], list[float]]  # over all processes: operations by part, tokens without padding, labels of silent turns, rows skipped
    room: int  # tokens of the rows of all processes, padding included
    skipped: dict[str, int]  # rows of the data that this process could not use so far, by reason
    waited: float  # seconds for which the device may have had nothing to do


@contextlib.contextmanager
def told_to_end() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come (`hosts.Ending`); a second one ends the program at once.

    Of several processes each must stop at the same step: what one of them hears, JAX's preemption service tells all. SIGTERM is left to it,
    and Ctrl-C becomes one.
    """
    heard: list[int] = []
    if jax.process_count() > 1:

        def pass_on(number: int, frame: object) -> None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.signal(signal.SIGINT, pass_on)
        try:
            yield hosts.Ending(lambda: False)
        finally:
            signal.signal(signal.SIGINT, before)
        return

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        signal.signal(number, signal.SIG_DFL)

    former = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield hosts.Ending(lambda: bool(heard))
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches on their way to the devices."""

    source: Source
    trainer: Trainer
    config: RunConfig
    trained: frozenset[str]  # paths of the parameters that are
    pause: tuple[int, ...]  # the labels of a silent turn

    def take(self, step: int, busy: Callable[[], bool] = lambda: False) -> Taken | None:
        """The next batch; None where the data have ended, in all processes."""
        start = time.perf_counter()
        rows = next(self.source, None)  # type: ignore[call-overload]
        waited = 0.0 if busy() else time.perf_counter() - start
        if self.config.data.epochs is not None and not hosts.total(0 if rows is None else sum(map(len, rows.samples))):
            return None
        if rows is None:
            return None
        segments = np.asarray(rows.batch.segments)
        tokens = int((segments != PADDING).sum())
        work = operations(self.trainer.model, rows.batch, set(self.trained))
        silent = turns_of(rows.batch, self.pause).silent_labels
        batch = hosts.put(rows.batch, self.trainer.recipe.placement)
        placement = self.trainer.recipe.placement
        copies = hosts.copies(placement.mesh)  # type: ignore[arg-type]
        numbers = (*dataclasses.astuple(work), tokens, silent, sum(rows.skipped.values()))
        totals = hosts.later_totals([number / copies for number in numbers], placement)
        room = self.config.data.rows * segments.shape[1]
        return Taken(step, batch, dict(self.source.get_state()), rows.samples, totals, room, rows.skipped, waited)


def run(
    state: TrainState,
    trainer: Trainer,
    source: Source,
    checkpoints: Checkpoints,
    report: Report,
    config: RunConfig,
    *,
    pause: tuple[int, ...],
    evaluator: Evaluator | None = None,
    compiled: Callable[[jax.stages.Compiled], None] = lambda program: None,
) -> tuple[TrainState, str]:
    """Takes steps until all are done, the data end or the program is told to; (the last state, why it ended).

    The state is saved as the config says, and at the end. Raises UserError, saving nothing, where a loss is not finite.

    Args:
      pause: the labels of a silent turn (`turns.silence`).
      evaluator: what is evaluated on the way and at the end, if anything.
      compiled: is given the step's program before it runs.
    """
    feed = Feed(source, trainer, config, frozenset(state.trained), pause)
    first, clock = int(state.step), report.clock
    if first >= config.steps:
        return state, "all steps were done before"
    with told_to_end() as ended:
        taken, last, why = feed.take(first + 1), None, "all steps are done"
        if taken is None:
            raise UserError("the data have no batch (left): ask for fewer steps, or for more epochs")
        clock.lap("start_up")
        go, tracing = trainer.compiled(taken.batch), False
        compiled(go)
        clock.lap("compile")
        while taken is not None:
            now = taken
            if now.step in config.profiled and not tracing:
                jax.profiler.start_trace(str(Path(config.out) / "profile"))
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=now.step):
                state, metrics = go(state, now.batch)
            if last is not None:
                report.write(_finish(*last, trainer, report))
            last = (now, metrics)
            stop = ended()
            more = not stop and now.step < config.steps

            metrics.loss.is_ready()  # type: ignore[union-attr]  (the first look only asks a GPU to tell: it is never yes)

            def busy(metrics: Metrics = metrics) -> bool:
                return not metrics.loss.is_ready()  # type: ignore[union-attr]

            taken = feed.take(now.step + 1, busy) if more else None
            if tracing and (taken is None or taken.step not in config.profiled):
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                tracing = False
            save = now.step % config.checkpoint.every == 0 or taken is None
            evaluate = evaluator is not None and not stop and (evaluator.due(now.step) or taken is None)
            if save or evaluate:
                record, last = _finish(*last, trainer, report), None
                if evaluator is not None and evaluate:
                    found = evaluator(state, ended)
                    clock.lap("evaluation")
                    record |= found or {}
                    if found is None:  # told to end in it: the step before it is the last
                        stop, save, taken = True, True, None
                report.write(record)  # before the checkpoint: a step that is saved has its line
            if save:
                report.publish()
                checkpoints.save(now.step, state, now.place)
                clock.lap("saving")
            if taken is None and now.step < config.steps:
                why = f"it was told to end at step {now.step}" if stop else f"the data ended at step {now.step}"
        if tracing:
            jax.profiler.stop_trace()
        unusable = _unusable(now, trainer)
        if unusable:
            report.say("rows that could not be used: " + ", ".join(f"{count:,} x {kind}" for kind, count in unusable.most_common()))
    checkpoints.wait()
    clock.lap("saving")
    return state, why


def _finish(taken: Taken, metrics: Metrics, trainer: Trainer, report: Report) -> dict[str, Any]:
    """Waits for a step; what is told of it. Raises UserError where its loss or gradients are not finite."""
    found = jax.tree.map(np.asarray, jax.block_until_ready(_local(metrics)))
    seconds = report.clock.lap("steps", waited=taken.waited)
    *parts, tokens, silent, unusable = taken.totals()
    work = Operations(*parts)
    best, devices = peak(jax.devices()[0]), jax.device_count()
    shares = None if best is None else {name: part / (seconds * devices * best) for name, part in dataclasses.asdict(work).items()}
    record: dict[str, Any] = {
        "step": taken.step,
        "loss": float(found.loss),
        "accuracy": float(found.accuracy),
        "labels": int(found.labels),
        "silence": silent / max(int(found.labels), 1),
        "gradient_norm": float(found.gradient_norm),
        "learning_rate": float(found.learning_rate),
        "skipped": bool(found.spike),
        "tokens": int(tokens),
        "tokens_per_second": tokens / seconds,
        "step_ms": 1e3 * seconds,
        "data_wait": min(1.0, taken.waited / seconds),
        "row_fill": tokens / taken.room,
        "rows_skipped": int(unusable),
        "flops": dataclasses.asdict(work),
        "mfu": None if shares is None else sum(shares.values()),
        "mfu_parts": shares,
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if not found.finite:
        rows = np.flatnonzero(~np.isfinite(found.row_loss)).tolist()
        samples = _samples(taken, trainer)
        where = f"in samples {_told(samples, rows)}" if rows else f"in the gradients, no row's loss alone, of {_told(samples, range(len(samples)))}"
        raise UserError(f"step {taken.step}: loss or gradients are not finite, {where}: go on from an earlier checkpoint with other settings or data")
    if found.spike:
        samples = record["skipped_samples"] = _samples(taken, trainer)
        which = f"samples of most loss: {_told(samples, np.argsort(-found.row_loss).tolist())}"
        report.say(f"step {taken.step}: a spike (loss {record['loss']:.3f}, gradient norm {record['gradient_norm']:.3g}), skipped; {which}")
    return record


def _unusable(taken: Taken, trainer: Trainer) -> Counter[str]:
    """Rows of the data that could not be used up to a batch, by reason, over all processes, which ask together."""
    mesh: Any = trainer.recipe.placement.mesh
    by_part = dict(hosts.gathered([hosts.shard(mesh)[0], taken.skipped]))  # processes that load the same rows count them once
    return sum((Counter(skipped) for skipped in by_part.values()), Counter())


def _samples(taken: Taken, trainer: Trainer) -> list[list[str]]:
    """Names of the samples of each row of a batch, over all processes, which ask together."""
    mesh: Any = trainer.recipe.placement.mesh
    own = list(zip(hosts.row_numbers(mesh, len(taken.samples)), map(list, taken.samples), strict=True))
    rows = {row: names for part in hosts.gathered(own) for row, names in part}
    return [rows[row] for row in sorted(rows)]


def _told(samples: list[list[str]], rows: Sequence[int]) -> str:
    """Names of the samples of these rows, the first TOLD of them."""
    more = len(rows) - TOLD
    return "; ".join(", ".join(samples[row]) for row in rows[:TOLD] if samples[row]) + (f"; and {more} rows more" if more > 0 else "")


def _local(metrics: Metrics) -> Metrics:
    """Replicated values, as this process has them."""
    return jax.tree.map(lambda a: a.addressable_data(0), metrics)
