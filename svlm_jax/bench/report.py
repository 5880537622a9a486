"""What a run is reported with: percentiles, memory, versions, and the table for people."""

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX records for every program it compiles
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av")


def percentiles(values: Any) -> dict[str, float]:
    """p50 and p99 of measured milliseconds."""
    p50, p99 = np.percentile(np.asarray(values, np.float64), [50, 99])
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4)}


def surroundings() -> dict[str, Any]:
    """When, where and with what: the fields that stand first in every object."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "commit": commit(),
        "versions": versions,
    }


def commit() -> str:
    """Of the sources that run; $SVLM_COMMIT on machines that have a copy without its history; else "unknown"."""
    stated = os.environ.get("SVLM_COMMIT")
    if stated:
        return stated
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


class Compilations:
    """Counts the programs that are compiled while it is open."""

    def __init__(self):
        self.count = 0

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == COMPILED

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)


def device_bytes(*, collect: bool = True) -> int:
    """In use on the default device; where it does not say (CPU), the bytes of all live arrays. `collect`: what is garbage is let go before."""
    if collect:
        gc.collect()
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_in_use" in stats:
        return int(stats["bytes_in_use"])
    return sum(array.nbytes for array in jax.live_arrays())


def host_bytes() -> int:
    """Resident memory of this process; 0 where /proc does not exist."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_json(path: str | Path, results: list[dict[str, Any]]) -> None:
    """One object, or a list of several; the file appears whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")
    os.replace(part, path)


def table(result: dict[str, Any]) -> str:
    """A result for people: every stage with its floor, then whether it keeps up with the video."""
    r, floors = result, result["floor_ms"]
    lines = [
        f"{r['model']} {r['weights']} on {r['device']}: {r['mode']}, {r['positions']}, {r['fps']:g} fps, {r['width']}x{r['height']}, "
        f"keys and values in {r['kv']}, "
        f"{r['streams']} stream{'s' * (r['streams'] > 1)}, {r['tokens_per_round']:g} tokens a round, {r['cached_tokens']:,.0f} cached",
        f"ceilings: copy {r['ceilings']['copy_tbps']:.3g} TB/s, matrix product {r['ceilings']['matmul_tflops']:.3g} TFLOP/s",
        f"{'':<16}{'p50 ms':>11}{'p99 ms':>11}{'floor ms':>11}{'of floor':>10}",
    ]
    rows = {"round": r["round_ms"], "first_word": r["first_word_ms"], **r["stages_ms"]}
    for name, value in rows.items():
        if value is None:
            lines.append(f"{name:<16}{'not measured':>22}")
            continue
        floor = floors.get(name)
        share = "" if floor is None else f"{floor:>11.3f}{100 * floor / value['p50'] if value['p50'] else 0:>9.0f}%"
        lines.append(f"{name:<16}{value['p50']:>11.3f}{value['p99']:>11.3f}{share}")
    if r["parts_ms"]:
        parts = sorted(r["parts_ms"].items(), key=lambda item: -item[1])[:16]
        lines.append("largest parts, ms: " + ", ".join(f"{name} {value:.3f}" for name, value in parts))
    if r["pipelined_round_ms"] is not None:
        lines.append(f"rounds enqueued ahead: {r['pipelined_round_ms']:.3f} ms each")
    lines.append(
        f"late over early {r['late_over_early']:.3f}, compilations after warm-up {r['compilations_after_warmup']}, device memory "
        f"{r['device_memory_growth_bytes']:+,} bytes, host memory {100 * r['host_memory_growth']:+.2f}%"
    )
    lines.append(_pace(r["round_ms"]["p50"], r["round_ms"]["p99"], 1e3 * r["chunk_seconds"]))
    return "\n".join(lines)


def _pace(p50: float, p99: float, interval: float) -> str:
    verdict = "faster than real time"
    if p99 > interval:
        verdict = "NOT faster than real time" if p50 > interval else "faster than real time, but not always"
    return f"{verdict}: a round of {interval:g} ms of video takes {p50:.1f} ms (p99 {p99:.1f}), {interval / p50:.2f} times real time"


Log = Callable[[str], None]
