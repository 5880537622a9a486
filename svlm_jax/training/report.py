"""What a run tells: a JSON line a step in a file, and a line on the terminal that is drawn anew."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

EVERY = 10.0  # seconds between lines where there is no terminal to draw on


class Report:
    """Lines of `path` after step `after` are dropped: the run goes on from there, and will take those steps again.

    Without a path nothing is told: one process speaks for all.
    """

    def __init__(self, path: Path | None, *, after: int, steps: int, out: TextIO | None = None):
        self._out: TextIO = (out or sys.stderr) if path else open(os.devnull, "w")  # noqa: SIM115  (open as long as the run)
        path = path or Path(os.devnull)
        self._steps, self._told, self._drawn = steps, 0.0, False
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # cut off by a kill
                    break
                if record["step"] <= after:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """One step's numbers. The file is whole after every line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._show(record)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._out.write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        self._out.flush()
        self._drawn = False

    def _show(self, record: dict[str, Any]) -> None:
        left = (self._steps - record["step"]) * record["step_ms"] / 1e3
        line = f"step {record['step']}/{self._steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        line += f"  data wait {record['data_wait']:.0%}" + ("" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}")
        line += f"  ETA {int(left // 3600)}:{int(left % 3600 // 60):02}:{int(left % 60):02}"
        if self._out.isatty():
            self._out.write(f"\r\x1b[K{line}")
            self._drawn = True
        elif time.monotonic() - self._told >= EVERY or record["step"] == self._steps:
            self._told = time.monotonic()
            self._out.write(line + "\n")
        self._out.flush()

    def close(self) -> None:
        if self._drawn:
            self._out.write("\n")
        self._file.close()
