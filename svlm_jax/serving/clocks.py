"""How long ago something was, across the end of a process and whatever is done to the wall clock.

Everything within a process (deadlines, time-outs, rates) goes by `time.monotonic`. A snapshot outlives it, so it is stamped with a moment
that the next process understands: by the time since the machine was started, where that is the same start, and by the wall clock elsewhere.
"""

import dataclasses
import math
import time
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux: another one after every start


@dataclasses.dataclass(frozen=True)
class Moment:
    """One instant by two clocks."""

    wall: float  # seconds since 1970
    up: float  # seconds since the machine was started, those asleep too
    boot: str  # which start of which machine; empty where the system does not tell

    @classmethod
    def now(cls) -> "Moment":
        try:
            return cls(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), BOOT_ID.read_text().strip())
        except (OSError, AttributeError):  # another system
            return cls(time.time(), 0.0, "")

    def until(self, later: "Moment") -> float:
        """Seconds from here to there; 0 where the clocks say that it was before, or nothing."""
        passed = later.up - self.up if self.boot and self.boot == later.boot else later.wall - self.wall
        return max(0.0, passed) if math.isfinite(passed) else 0.0
