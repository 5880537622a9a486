"""A run of training that is killed again and again, against the same run left alone: is one bit of its course another?

    python benchmarks/kills.py [--kills 20] [--steps 200] [--json FILE]

The tiny preset on a CPU. Half of the kills (-9) come while a checkpoint is being written, which its temporary directory tells,
the others at any time, the start included. Each start must go on from the last checkpoint that is whole.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def start(out: Path, *overrides: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """`train.py sft_tiny`. Runs beside each other share what they compiled, and the preset's annotations."""
    own = {"TMPDIR": str(out.parent)}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, str(ROOT / "train.py"), "sft_tiny", f"out={out}", *overrides]
    settings = {"JAX_PLATFORMS": "cpu", **os.environ, **own, **cache, **(environment or {})}
    return subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)


def records(out: Path) -> list[dict]:
    """Whole lines of metrics.jsonl."""
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def course(out: Path) -> dict[int, tuple[float, ...]]:
    """What training computed, by step. AssertionError where a step is told twice."""
    lines = records(out)
    found = {line["step"]: (line["loss"], line["gradient_norm"], line["accuracy"], line["labels"]) for line in lines}
    assert len(found) == len(lines), "a step is told twice"
    return found


def checkpoints(out: Path) -> tuple[list[int], list[str]]:
    """(steps of whole checkpoints, names of those that are being written)."""
    folder = out / "checkpoints"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal()), [name for name in names if "tmp" in name]


def kill_in_a_save(run: subprocess.Popen, out: Path, number: int, delay: float) -> bool:
    """Kills `delay` seconds after the `number`-th checkpoint has begun to be written. False where the run ended before that."""
    seen: set[str] = set(checkpoints(out)[1])  # left by the last kill
    begun = 0
    while run.poll() is None:
        fresh = set(checkpoints(out)[1]) - seen
        begun, seen = begun + len(fresh), seen | fresh
        if begun >= number:
            time.sleep(delay)
            break
        time.sleep(0.0005)
    alive = run.poll() is None
    run.kill()
    return alive


def resumed_after(told: str) -> int:
    """The step after which a run said that it goes on; 0 where it began anew."""
    found = re.search(r"goes on after step (\d+)", told)
    return int(found[1]) if found else 0


def endure(out: Path, overrides: list[str], kills: int, seconds: float, rng: random.Random) -> list[dict[str, Any]]:
    """Kills a run `kills` times, half of them in a save, and lets it end; what happened each time. AssertionError where a start went wrong.

    Args:
      seconds: how long a life lasts at most, where the kill comes at any time.
    """
    happened = []
    for number in range(kills + 1):
        whole, _ = checkpoints(out)
        run, begun, saving = start(out, *overrides), time.monotonic(), number % 2 == 0
        if number == kills:
            _, told = run.communicate()
            assert run.returncode == 0, told
        elif saving:
            kill_in_a_save(run, out, rng.randint(2, 4), rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, seconds))
            run.kill()
        if number < kills:
            _, told = run.communicate()
            assert run.returncode < 0, f"it ended before it was killed: {told}"
        after, latest = resumed_after(told), max(whole, default=0)
        assert after in (0, latest) and (after == latest or number < kills), f"went on after step {after}, and step {latest} was the last whole one"
        assert "Traceback" not in told, told
        left, partial = checkpoints(out)
        happened.append(
            {
                "kill": "in a save" if saving else "at any time",
                "seconds": round(time.monotonic() - begun, 2),
                "went_on_after": after or None,
                "steps_told": max((line["step"] for line in records(out)), default=0),
                "whole": left,
                "partial": partial,
            }
        )
        print(happened[-1], file=sys.stderr)
    happened[-1]["kill"] = "none: it ended"
    return happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--life", type=float, default=20.0, help="seconds, at most, where the kill comes at any time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    overrides = [f"steps={arguments.steps}", "checkpoint.every=1"]
    with tempfile.TemporaryDirectory() as scratch:
        alone, killed = Path(scratch) / "alone", Path(scratch) / "killed"
        run = start(alone, *overrides)
        _, told = run.communicate()
        assert run.returncode == 0, told
        lives = endure(killed, overrides, arguments.kills, arguments.life, random.Random(arguments.seed))
        wanted, found = course(alone), course(killed)
        spent = records(killed)[-1]
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "versions": versions(),
        "steps": arguments.steps,
        "kills": arguments.kills,
        "kills_that_left_a_checkpoint_half_written": sum(
            bool(set(life["partial"]) - set(before)) for before, life in zip([[], *(life["partial"] for life in lives)], lives[:-1], strict=False)
        ),
        "identical": found == wanted,
        "goodput": spent["goodput"],
        "lives": lives,
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    sys.exit(0 if found == wanted else 1)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {name: version(name) for name in ("jax", "flax", "orbax-checkpoint", "grain")}


if __name__ == "__main__":
    main()
