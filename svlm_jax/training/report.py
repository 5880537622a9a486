"""What a run tells: a JSON line a step in a file, a line on the terminal that is drawn anew, and other places that are asked for."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from svlm_jax.storage import Mirror
from svlm_jax.training.goodput import Clock
from svlm_jax.training.sinks import Sink, numbers_of

EVERY = 10.0  # seconds between lines where there is no terminal to draw on


class Report:
    """Lines of `path` after step `after` are dropped: the run goes on from there, and will take those steps again.

    Without a path nothing is told: one process speaks for all.

    Args:
      mirror: keeps copies of what is written, brought up to date by `publish`.
      began: when this process did, as `time.time()` has it; what lies between the last line that is kept and then is a restart.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        after: int,
        steps: int,
        out: TextIO | None = None,
        sinks: Sequence[Sink] = (),
        mirror: Mirror | None = None,
        began: float | None = None,
    ):
        self._out: TextIO = (out or sys.stderr) if path else open(os.devnull, "w")  # noqa: SIM115  (open as long as the run)
        path = path or Path(os.devnull)
        self._steps, self._told, self._drawn, self._sinks, self._mirror = steps, 0.0, False, sinks, mirror
        self._first: tuple[int, float] | None = None  # step and time of this process's first line
        self._held_out = ""
        found = _lines(path)
        kept = [record for record in found if record["step"] <= after]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        began = time.time() if began is None else began
        self.clock = Clock(_spent_before(found, kept, began), since=began)

    def write(self, record: dict[str, Any]) -> None:
        """One step's numbers. The file is whole after every line."""
        record = record | {"goodput": self.clock.goodput, "spent": dict(self.clock.spent), "time": time.time()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(record["step"], numbers_of(record))
        self._show(record)

    def publish(self) -> None:
        """What is written so far is in the run's bucket, where it has one."""
        if self._mirror is not None:
            self._mirror.push()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._out.write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        self._out.flush()
        self._drawn = False

    def _show(self, record: dict[str, Any]) -> None:
        step, now = record["step"], record["time"]
        if self._first is None:
            self._first = step, now
        first, since = self._first
        left = (self._steps - step) * (record["step_ms"] / 1e3 if step == first else (now - since) / (step - first))
        line = f"step {step}/{self._steps}  loss {record['loss']:.4f}"
        if record.get("eval_loss") is not None:
            self._held_out = f"  held out {record['eval_loss']:.4f} (step {step}; unigram {record['eval_unigram_loss']:.4f})"
        line += self._held_out + f"  {record['tokens_per_second']:,.0f} tokens/s"
        line += f"  data wait {record['data_wait']:.0%}" + _mfu(record)
        line += f"  ETA {int(left // 3600)}:{int(left % 3600 // 60):02}:{int(left % 60):02}"
        if self._out.isatty():
            self._out.write(f"\r\x1b[K{line}")
            self._drawn = True
        elif time.monotonic() - self._told >= EVERY or step == self._steps or "eval_loss" in record:
            self._told = time.monotonic()
            self._out.write(line + "\n")
        self._out.flush()

    def close(self) -> None:
        if self._drawn:
            self._out.write("\n")
        self._file.close()
        for sink in self._sinks:
            sink.close()


def _mfu(record: dict[str, Any]) -> str:
    if record["mfu"] is None:
        return ""
    return f"  MFU {record['mfu']:.1%} ({', '.join(f'{part} {share:.1%}' for part, share in record['mfu_parts'].items())})"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, up to a line that a kill cut off."""
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _spent_before(found: list[dict[str, Any]], kept: list[dict[str, Any]], began: float) -> dict[str, float]:
    """Seconds by kind before this process began. Steps that are going to be taken again, and the time between, are restarts."""
    told = [record for record in found if "spent" in record]
    if not told:
        return {}
    spent = next((dict(record["spent"]) for record in reversed(kept) if "spent" in record), {})
    since = told[0]["time"] - sum(told[0]["spent"].values())  # the run's first moment
    spent["restarts"] = spent.get("restarts", 0.0) + max(0.0, began - since - sum(spent.values()))
    return spent
