"""Step after step: data ahead of the device, checkpoints beside it, and an end that loses nothing."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
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
    totals: Callable[[], list[float]]  # over all processes: operations by part, tokens without padding, labels of silent turns
    fill: float  # part of the rows' tokens that are there
    skipped: dict[str, int]  # rows of the data that could not be used so far, by reason
    waited: float  # seconds for which the device may have had nothing to do


@contextlib.contextmanager
def told_to_end() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come; a second one ends the program at once.

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
            yield lambda: False
        finally:
            signal.signal(signal.SIGINT, before)
        return

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        signal.signal(number, signal.SIG_DFL)

    former = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(heard)
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
        if segments.max(initial=0) > self.config.max_segments:
            raise UserError(f"a row has {segments.max()} chunks, more than max_segments = {self.config.max_segments}: raise it")
        tokens = int((segments != PADDING).sum())
        work = operations(self.trainer.model, rows.batch, set(self.trained))
        silent = turns_of(rows.batch, self.pause).silent_labels
        batch = hosts.put(rows.batch, self.trainer.recipe.placement)
        placement = self.trainer.recipe.placement
        copies = hosts.copies(placement.mesh)  # type: ignore[arg-type]
        totals = hosts.later_totals([number / copies for number in (*dataclasses.astuple(work), tokens, silent)], placement)
        return Taken(step, batch, dict(self.source.get_state()), rows.samples, totals, tokens / segments.size, rows.skipped, waited)


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
) -> tuple[TrainState, str]:
    """Takes steps until all are done, the data end or the program is told to; (the last state, why it ended).

    The state is saved as the config says, and at the end. Raises UserError, saving nothing, where a loss is not finite.

    Args:
      pause: the labels of a silent turn (`turns.silence`).
      evaluator: what is evaluated on the way and at the end, if anything.
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
            stop = hosts.stop_asked(now.step, ended())
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
                    record |= evaluator(state, ended) or {}
                    clock.lap("evaluation")
                report.write(record)  # before the checkpoint: a step that is saved has its line
            if save:
                report.publish()
                checkpoints.save(now.step, state, now.place)
                clock.lap("saving")
            if taken is None and now.step < config.steps:
                why = f"it was told to end at step {now.step}" if stop else f"the data ended at step {now.step}"
    checkpoints.wait()
    clock.lap("saving")
    return state, why


def _finish(taken: Taken, metrics: Metrics, trainer: Trainer, report: Report) -> dict[str, Any]:
    """Waits for a step; what is told of it. Raises UserError where its loss or gradients are not finite."""
    found = jax.tree.map(np.asarray, jax.block_until_ready(_local(metrics)))
    seconds = report.clock.lap("steps", waited=taken.waited)
    *parts, tokens, silent = taken.totals()
    work = Operations(*parts)
    best, devices = peak(jax.devices()[0]), jax.device_count()
    shares = None if best is None else {name: part / (seconds * devices * best) for name, part in dataclasses.asdict(work).items()}
    record = {
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
        "row_fill": taken.fill,
        "rows_skipped": sum(taken.skipped.values()),
        "flops": dataclasses.asdict(work),
        "mfu": None if shares is None else sum(shares.values()),
        "mfu_parts": shares,
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if not found.finite:
        rows = [i for i, loss in enumerate(found.row_loss) if not np.isfinite(loss)]
        mesh: Any = trainer.recipe.placement.mesh
        own = dict(zip(hosts.row_numbers(mesh, len(taken.samples)), taken.samples, strict=True))
        names = [", ".join(own[i]) for i in rows if i in own]
        where = f"in samples {'; '.join(names)}" if names else "in the gradients, no row's loss alone" if not rows else f"in rows {rows}"
        raise UserError(f"step {taken.step}: loss or gradients are not finite, {where}: go on from an earlier checkpoint with other settings or data")
    if found.spike:
        report.say(f"step {taken.step}: a spike (loss {record['loss']:.3f}, gradient norm {record['gradient_norm']:.3g}), skipped: {taken.samples}")
    return record


def _local(metrics: Metrics) -> Metrics:
    """Replicated values, as this process has them."""
    return jax.tree.map(lambda a: a.addressable_data(0), metrics)
