"""Trains the model of the simulated match from nothing, within a given time: data, both stages, the checkpoint, and a record of it all.

    python benchmarks/train_match.py FOLDER --seconds 1500 --processes 16 --json benchmarks/train_match.json

What is in FOLDER already is gone on with: data are not made again, a stage that was stopped goes on from its last checkpoint, and
`--weights DIR` begins from weights alone, such as FOLDER/model of another machine. FOLDER/model is written anew after every checkpoint, to be copied
away: what has been learnt should never be in one place only.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 20_000  # steps, more than the first stage has time for: it ends when that is up, at its full rate
STEADY = (f"steps={LONGEST}", "step.optimizer.final=1.0", "step.optimizer.warmup=0.0075")
START, END = 60.0, 25.0  # seconds that the second stage takes to begin (it compiles) and to be converted


class Clock:
    """Seconds since the beginning, told with what is done."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.begin

    def say(self, text: str) -> None:
        print(f"[{self():6.0f} s] {text}", file=sys.stderr, flush=True)


def start(*words: str, log: Path | None = None, **environment: str) -> subprocess.Popen:
    """Begins a module or script; what it says goes into `log`."""
    with open(log or os.devnull, "a") as out:
        env = {**os.environ, "PYTHONPATH": _path(), **environment}
        return subprocess.Popen([sys.executable, *words], stderr=out if log else None, env=env)


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps of a run; lines of other kinds are left out."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if "loss" in row and "step_ms" in row]


def stage(name: str, preset: str, args: argparse.Namespace, settings: list[str], clock: Clock, seconds: float | None) -> list[dict[str, Any]]:
    """Runs train.py; its steps. Ends the program where it fails."""
    run, log = args.folder / name, args.folder / f"{name}.log"
    data = [f"data.datasets.{each}.{key}={value}" for each in _sets(preset) for key, value in _places(args.folder, each)]
    work, kept, asked = start(str(ROOT / "train.py"), preset, f"out={run}", *data, *settings, *args.set, log=log), 0, False
    begin = time.perf_counter()
    while (code := work.poll()) is None:
        time.sleep(1)
        if not asked and seconds is not None and time.perf_counter() - begin > seconds:
            work.send_signal(signal.SIGTERM)  # it saves, and ends
            asked = True
        saved = max((int(each.name) for each in (run / "checkpoints").glob("*") if each.name.isdecimal()), default=0)
        if saved > kept:  # what has been learnt so far is never in one place only
            kept = saved
            export(run, args.folder / "model")
    steps = metrics(run)
    clock.say(f"{name}: exit code {code}, {len(steps)} steps, loss {steps[-1]['loss']:.4f}" if steps else f"{name}: exit code {code}, no step")
    if code or not steps:
        sys.exit(f"{name} failed: see the end of {log}")
    if not export(run, args.folder / "model"):
        sys.exit(f"{run} cannot be converted")
    return steps


def _sets(preset: str) -> list[str]:
    return [*(["dense"] if preset == "sft_match_dense" else []), "chunks", "asked", "placed", "openings"]


def _places(folder: Path, name: str) -> list[tuple[str, str]]:
    return [("path", str(folder / "data" / f"{name}.jsonl")), ("videos", str(folder / "data"))]


def export(run: Path, target: Path) -> bool:
    """The last checkpoint's weights in bfloat16, in place of those that were there; whether they could be read."""
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    words = ("-m", "svlm_jax.cli", "convert", str(run), str(fresh), "--dtype", "bfloat16")
    if start(*words, log=target.with_name("convert.log"), JAX_PLATFORMS="cpu").wait():  # the accelerator is at work
        return False
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return True


def curve(steps: list[dict[str, Any]], points: int = 120) -> list[list[float]]:
    """[step, loss, accuracy], means of so many parts."""
    size = max(1, len(steps) // points)
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [[part[-1]["step"], *(round(sum(row[key] for row in part) / len(part), 5) for key in ("loss", "accuracy"))] for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=1500.0, help="for everything (default: 1500)")
    parser.add_argument("--second-stage", type=float, default=0.4, help="its share of the training (default: 0.4)")
    parser.add_argument("--matches", type=int, default=24, help="of two hours (default: 24)")
    parser.add_argument("--openings", type=int, default=640, help="matches of 48 seconds (default: 640)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2, help="that make the data")
    parser.add_argument("--weights", type=Path, help="weights to begin with")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="settings of both stages")
    parser.add_argument("--json", type=Path, help="where the record goes")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    clock, spent = Clock(), {}
    data = args.folder / "data"
    if not (data / "chunks.jsonl").exists():
        counts = ["--matches", str(args.matches), "--openings", str(args.openings), "--processes", str(args.processes)]
        if start("-m", "svlm_jax.demo.training_data", str(data), *counts).wait():
            sys.exit("the data could not be made")
    spent["data"] = clock()
    clock.say(f"{len(list(data.glob('*.mp4')))} videos")
    begin = args.weights or args.folder / "start"
    if not args.weights and not begin.exists():
        start("-m", "svlm_jax.demo.make_match_model", str(begin), JAX_PLATFORMS="cpu").wait()

    rest = args.seconds - clock()
    first = stage("run1", "sft_match", args, [f"weights={begin}", *STEADY], clock, rest - args.second_stage * rest)
    spent["first stage"] = clock() - spent["data"]
    recent = first[-300:]
    step_ms = sum(row["step_ms"] for row in recent) / len(recent)
    steps = max(20, int((args.seconds - clock() - START - END) * 1e3 / step_ms))
    second = stage("run2", "sft_match_dense", args, [f"weights={args.folder / 'run1'}", f"steps={steps}"], clock, None)
    spent["second stage"] = clock() - spent["data"] - spent["first stage"]
    if args.json:
        import jax

        record = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": jax.devices()[0].device_kind,
            "commit": os.environ.get("SVLM_COMMIT", ""),
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
            "command": " ".join(["python", "benchmarks/train_match.py", *sys.argv[1:]]),
            "seconds": {name: round(value, 1) for name, value in spent.items()},
            "steps": [len(first), len(second)],
            "rows_a_step": 48,
            "step_ms": [round(sum(row["step_ms"] for row in each[5:]) / max(1, len(each[5:])), 1) for each in (first, second)],
            "mfu": [each[-1].get("mfu") for each in (first, second)],
            "curve": [curve(first), curve(second)],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    clock.say(f"done: {args.folder / 'model'}")


if __name__ == "__main__":
    main()
