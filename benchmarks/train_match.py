"""Trains the model of the simulated match from nothing, within a given time: data, three stages, the checkpoint, and a record of it all.

Drills are made first; matches are made while the first stage learns to see from them.

    python benchmarks/train_match.py FOLDER --seconds 1500 --processes 16 --json benchmarks/train_match.json

What is in FOLDER already is gone on with: data are not made again, a stage that was stopped goes on from its last checkpoint, and
`--weights DIR` begins from weights alone, such as FOLDER/model of another machine. FOLDER/model is written anew after every checkpoint, to be copied
away: what has been learnt should never be in one place only.
"""

import argparse
import datetime
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svlm_jax.demo.training_data import SETS
from svlm_jax.training.config import RunConfig, override

ROOT = Path(__file__).resolve().parent.parent
MAKER = "svlm_jax.demo.training_data"
STAGES = {"sft_match_sight": 0.45, "sft_match": 0.31, "sft_match_dense": 0.24}  # presets, and at most so much of the time that is left for these
SEEN = 0.985  # right tokens of the last steps, at which the first stage ends: half of what is asked are the numbers and teams of players
LONGEST = 20_000  # steps, more than a stage has time for: all but the last end when that is up, at their full rate
STEADY = (f"steps={LONGEST}", "step.optimizer.final=1.0", "step.optimizer.warmup=0.0075")
OF_MATCHES = {name for name, each in SETS.items() if each.of != "drill"} - {"goals"} | {"dense"}  # those that share seconds
DRILLS = 100_000  # the first of their seeds
UNKNOWN = 0.2  # seconds a step, where none has been timed
START, END = 45.0, 25.0  # seconds that the last stage takes to begin and to be converted


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


def sees(run: Path) -> bool:
    """Whether nearly all is right that a run has answered of late."""
    steps = metrics(run)[-50:]
    return len(steps) == 50 and statistics.mean(row["accuracy"] for row in steps) >= SEEN


def stage(
    name: str, preset: str, args: argparse.Namespace, settings: list[str], clock: Clock, enough: Callable[[float], bool]
) -> list[dict[str, Any]]:
    """Runs train.py until it ends or there is `enough`, after so many seconds; its steps. Ends the program where it fails."""
    run, log = args.folder / name, args.folder / f"{name}.log"
    sets = preset_config(preset).data.datasets
    data = [f"data.datasets.{each}.{key}={value}" for each in sets for key, value in _places(args, each)]
    work, kept, asked = start(str(ROOT / "train.py"), preset, f"out={run}", *data, *settings, *args.set, log=log), 0, False
    begin = time.perf_counter()
    while (code := work.poll()) is None:
        time.sleep(1)
        if not asked and enough(time.perf_counter() - begin):
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


def preset_config(preset: str) -> RunConfig:
    return importlib.import_module(f"svlm_jax.configs.{preset}").config()


def _places(args: argparse.Namespace, name: str) -> list[tuple[str, str]]:
    file = args.folder / "data" / f"{name}.jsonl"
    return [("path", str(apart(file) if args.apart and name in OF_MATCHES else file)), ("videos", str(args.folder / "data"))]


def apart(file: Path) -> Path:
    """The chunks of a file that share nothing: those that begin where another one ends, half of all."""
    window, target = SETS["chunks" if file.stem == "dense" else file.stem].window, file.with_name(f"{file.stem}_apart.jsonl")
    with file.open() as rows, target.open("w") as out:
        out.writelines(row for row in rows if json.loads(row)[0]["content"][0]["video_start"] % window == 0)
    return target


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


def seconds_a_step(runs: dict[str, list[dict[str, Any]]]) -> float:
    """As the stage before had them, waiting and saving included; of the first stage of all nothing is known."""
    steps = list(runs.values())[-1][-600:] if runs else []
    return (steps[-1]["time"] - steps[0]["time"]) / (len(steps) - 1) if len(steps) > 1 else UNKNOWN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=1500.0, help="for everything (default: 1500)")
    parser.add_argument("--matches", type=int, default=32, help="long ones (default: 32)")
    parser.add_argument("--minutes", type=float, default=120.0, help="of each of these (default: 120)")
    parser.add_argument("--openings", type=int, default=640, help="matches of 48 seconds (default: 640)")
    parser.add_argument("--drills", type=int, default=64, help="of half an hour (default: 64)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2, help="that make the data")
    parser.add_argument("--weights", type=Path, help="weights to begin with")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="with --weights: those that are left")
    parser.add_argument("--apart", action="store_true", help="chunks of matches that share nothing: every other one")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="settings of all stages")
    parser.add_argument("--json", type=Path, help="where the record goes")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    clock, spent = Clock(), {}
    data, processes = args.folder / "data", str(args.processes)
    if not (data / "glances.jsonl").exists():
        counts = ("--matches", "0", "--openings", "0", "--drills", str(args.drills), "--first-seed", str(DRILLS))
        if start("-m", MAKER, str(data), *counts, "--processes", processes).wait():
            sys.exit("the drills could not be made")
    spent["drills"] = clock()
    clock.say(f"{len(list(data.glob('*.mp4')))} videos of drills")
    matches = None
    if not (data / "chunks.jsonl").exists():  # while the first stage trains, which looks at drills alone
        counts = ("--matches", str(args.matches), "--minutes", str(args.minutes), "--openings", str(args.openings), "--drills", "0")
        matches = start("-m", MAKER, str(data), *counts, "--processes", str(max(1, args.processes * 3 // 8)))
    begin = args.weights or args.folder / "start"
    if not args.weights and not begin.exists():
        start("-m", "svlm_jax.demo.make_match_model", str(begin), JAX_PLATFORMS="cpu").wait()

    runs: dict[str, list[dict[str, Any]]] = {}
    weights = begin
    for number, preset in enumerate(args.stages):
        before, left = clock(), args.seconds - clock()
        if number and matches is not None and matches.wait():
            sys.exit("the matches could not be made")
        run = args.folder / f"run{number}"
        share = left * STAGES[preset] / sum(STAGES[name] for name in args.stages[number:])
        last = preset == args.stages[-1]
        length = [f"steps={max(20, int((left - START - END) / seconds_a_step(runs)))}"] if last else list(STEADY)

        def enough(seconds: float, preset: str = preset, run: Path = run, share: float = share, last: bool = last) -> bool:
            if preset == "sft_match_sight" and not last:  # its data are there, those of the next stage not yet
                return (matches is None or matches.poll() is not None) and (seconds > share or sees(run))
            return not last and seconds > share

        each = max(1, (os.cpu_count() or 1) // preset_config(preset).data.lanes)
        settings = [f"weights={weights}", f"workers.processes={each}", *length]
        runs[preset] = stage(run.name, preset, args, settings, clock, enough)
        weights = run
        spent[preset] = clock() - before
    if args.json:
        import jax

        record = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": jax.devices()[0].device_kind,
            "commit": os.environ.get("SVLM_COMMIT", ""),
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
            "command": " ".join(["python", "benchmarks/train_match.py", *sys.argv[1:]]),
            "seconds": {name: round(value, 1) for name, value in spent.items()},
            "steps": {name: len(steps) for name, steps in runs.items()},
            "rows_a_step": {name: override(preset_config(name), args.set).data.rows for name in runs},
            "step_ms_median": {name: round(statistics.median(row["step_ms"] for row in steps), 1) for name, steps in runs.items()},
            "mfu_median": {name: statistics.median(row["mfu"] or 0.0 for row in steps) for name, steps in runs.items()},
            "data_wait": {name: steps[-1]["spent"]["data_wait"] for name, steps in runs.items()},
            "curve": {name: curve(steps) for name, steps in runs.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    clock.say(f"done: {args.folder / 'model'}")


if __name__ == "__main__":
    main()
