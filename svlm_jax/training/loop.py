"""Step after step: data ahead of the device, checkpoints beside it, and an end that loses nothing."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from svlm_jax.data.batch import PADDING
from svlm_jax.data.pipeline import Rows
from svlm_jax.errors import UserError
from svlm_jax.training import hosts
from svlm_jax.training.checkpoint import Checkpoints
from svlm_jax.training.config import RunConfig
from svlm_jax.training.flops import Operations, operations, peak
from svlm_jax.training.report import Report
from svlm_jax.training.step import Metrics, Trainer, TrainState


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
    work: Operations  # of this process's rows
    tokens: int  # of this process's rows, without padding
    fill: float  # part of the rows' tokens that are there
    skipped: dict[str, int]  # rows of the data that could not be used so far, by reason
    waited: float  # seconds for which the device may have had nothing to do


@contextlib.contextmanager
def told_to_end() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come; a second one ends the program at once."""
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(heard)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take(source: Source, trainer: Trainer, step: int, trained: set[str], config: RunConfig, busy: Callable[[], bool]) -> Taken | None:
    """The next batch, on its way to the devices; None where the data have ended."""
    start = time.perf_counter()
    rows = next(source, None)  # type: ignore[call-overload]
    if rows is None:
        return None
    waited = 0.0 if busy() else time.perf_counter() - start
    segments = np.asarray(rows.batch.segments)
    if segments.max(initial=0) > config.max_segments:
        raise UserError(f"a row has {segments.max()} chunks, more than max_segments = {config.max_segments}: raise it")
    tokens = int((segments != PADDING).sum())
    work = operations(trainer.model, rows.batch, trained)
    batch = hosts.put(rows.batch, trainer.recipe.placement)
    return Taken(step, batch, dict(source.get_state()), rows.samples, work, tokens, tokens / segments.size, rows.skipped, waited)


def run(
    state: TrainState, trainer: Trainer, source: Source, checkpoints: Checkpoints, report: Report, config: RunConfig
) -> tuple[TrainState, str]:
    """Takes steps until all are done, the data end or the program is told to; (the last state, why it ended).

    The state is saved as the config says, and at the end. Raises UserError, saving nothing, where a loss is not finite.
    """
    first, trained = int(state.step), set(state.trained)
    if first >= config.steps:
        return state, "all steps were done before"
    taken, last, why = take(source, trainer, first + 1, trained, config, lambda: False), None, "all steps are done"
    if taken is None:
        raise UserError("the data have no batch (left): ask for fewer steps, or for more epochs")
    go, finished, tracing = trainer.jitted(taken.batch), time.perf_counter(), False
    with told_to_end() as ended:
        while taken is not None:
            now = taken
            if now.step in config.profiled and not tracing:
                jax.profiler.start_trace(str(Path(config.out) / "profile"))
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=now.step):
                state, metrics = go(state, now.batch)
            if last is not None:
                finished = _finish(*last, trainer, report, finished)
            last = (now, metrics)
            stop = hosts.stop_asked(now.step, ended())
            more = not stop and now.step < config.steps

            def busy(metrics: Metrics = metrics) -> bool:
                return not metrics.loss.is_ready()  # type: ignore[union-attr]

            taken = take(source, trainer, now.step + 1, trained, config, busy) if more else None
            if tracing and (taken is None or taken.step not in config.profiled):
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                tracing = False
            due = now.step % config.checkpoint.every == 0
            if due or taken is None:
                finished, last = _finish(*last, trainer, report, finished), None
                checkpoints.save(now.step, state, now.place)
            if taken is None and now.step < config.steps:
                why = f"it was told to end at step {now.step}" if stop else f"the data ended at step {now.step}"
    checkpoints.wait()
    return state, why


def _finish(taken: Taken, metrics: Metrics, trainer: Trainer, report: Report, before: float) -> float:
    """Waits for a step and tells of it; the time when it was done. Raises UserError where its loss or gradients are not finite."""
    found = jax.tree.map(np.asarray, jax.block_until_ready(_local(metrics)))
    now = time.perf_counter()
    seconds = now - before
    mesh: Any = trainer.recipe.placement.mesh
    copies = hosts.copies(mesh)
    work = Operations(*(hosts.total(part / copies) for part in dataclasses.astuple(taken.work)))
    best, devices = peak(jax.devices()[0]), jax.device_count()
    tokens = hosts.total(taken.tokens / copies)
    record = {
        "step": taken.step,
        "loss": float(found.loss),
        "accuracy": float(found.accuracy),
        "labels": int(found.labels),
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
        "mfu": None if best is None else work.total / (seconds * devices * best),
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if not found.finite:
        rows = [i for i, loss in enumerate(found.row_loss) if not np.isfinite(loss)]
        own = dict(zip(hosts.row_numbers(mesh, len(taken.samples)), taken.samples, strict=True))
        names = [", ".join(own[i]) for i in rows if i in own]
        where = f"in samples {'; '.join(names)}" if names else "in the gradients, no row's loss alone" if not rows else f"in rows {rows}"
        raise UserError(f"step {taken.step}: loss or gradients are not finite, {where}: go on from an earlier checkpoint with other settings or data")
    report.write(record)
    if found.spike:
        report.say(f"step {taken.step}: a spike (loss {record['loss']:.3f}, gradient norm {record['gradient_norm']:.3g}), skipped: {taken.samples}")
    return now


def _local(metrics: Metrics) -> Metrics:
    """Replicated values, as this process has them."""
    return jax.tree.map(lambda a: a.addressable_data(0), metrics)
