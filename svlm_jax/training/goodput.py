"""Where the wall time of a run goes, over all its restarts: goodput is the share that went into steps."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

KINDS = ("steps", "data_wait", "start_up", "compile", "saving", "evaluation", "restarts")


class Clock:
    """Seconds by kind. Every moment belongs to one of them: a lap takes all that has gone by since the last."""

    def __init__(self, spent: Mapping[str, float] | None = None, *, since: float):
        self.spent = {kind: (spent or {}).get(kind, 0.0) for kind in KINDS}
        self._last = since

    def lap(self, kind: str, *, waited: float = 0.0) -> float:
        """Gives the time since the last lap to `kind`, of which `waited` seconds went by waiting for data; all of it in seconds."""
        now = time.time()
        seconds, self._last = max(now - self._last, 1e-9), now
        waited = min(waited, seconds)
        self.spent["data_wait"] += waited
        self.spent[kind] += seconds - waited
        return seconds

    @property
    def goodput(self) -> float:
        """Share of all time that went into steps."""
        return self.spent["steps"] / max(sum(self.spent.values()), 1e-9)

    def __str__(self) -> str:
        parts = ", ".join(f"{kind.replace('_', ' ')} {seconds:.1f} s" for kind, seconds in self.spent.items() if seconds >= 0.05)
        return f"goodput {self.goodput:.1%} ({parts})"


def process_start() -> float:
    """When this process began, as `time.time()` has it; where the system does not tell, now."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - age
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
