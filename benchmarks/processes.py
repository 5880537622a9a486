"""The same training in one, two and four processes, and in four of which one is told to end, gone on with by two.

    python benchmarks/processes.py [--steps 12] [--json FILE]

The tiny preset on a CPU, a device a process, with held-out evaluation. Sums are taken in another order, so losses agree to rounding only.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kills import ROOT, records, resumed_after, start, versions


def launch(out: Path, count: int, overrides: list[str]) -> list[subprocess.Popen]:
    if count == 1:
        return [start(out, *overrides)]
    with socket.socket() as port:
        port.bind(("localhost", 0))
        address = f"localhost:{port.getsockname()[1]}"
    return [start(out, *overrides, f"hosts.count={count}", f"hosts.coordinator={address}", f"hosts.index={i}") for i in range(count)]


def end(runs: list[subprocess.Popen]) -> str:
    """What the first said. AssertionError where any of them failed."""
    told = [run.communicate()[1] for run in runs]
    assert not any(run.returncode for run in runs), told
    return told[0]


def largest(ours: list[dict], theirs: list[dict], key: str) -> float:
    """The largest difference of a number that both have at a step, as a part of it."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) if key in b]
    assert pairs
    return max(abs(a - b) / abs(b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        overrides = [f"steps={arguments.steps}", "checkpoint.every=1000", "evaluation.every=4"]
        overrides.append(f"evaluation.datasets.held.path={folder / 'svlm-jax-sft-tiny' / 'sample_annotations.jsonl'}")
        courses = {}
        for count in (1, 2, 4):
            end(launch(folder / str(count), count, overrides))
            courses[count] = records(folder / str(count))
        out = folder / "changed"
        runs = launch(out, 4, overrides)
        while not any(record["step"] >= arguments.steps // 3 for record in records(out)):
            assert all(run.poll() is None for run in runs)
            time.sleep(0.02)
        runs[-1].send_signal(signal.SIGTERM)  # one is told, all end
        end(runs)
        last = records(out)[-1]["step"]
        assert last < arguments.steps
        assert resumed_after(end(launch(out, 2, overrides))) == last
        courses["4, then 2"] = records(out)
    keys = ("loss", "gradient_norm", "eval_loss")
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "versions": versions(),
        "steps": arguments.steps,
        "four_ended_at_step": last,
        "largest_difference_from_one_process": {
            str(name): {key: largest(course, courses[1], key) for key in keys} for name, course in courses.items() if name != 1
        },
        "labels_and_samples_are_the_same": all(
            [(line["labels"], line["tokens"], line.get("eval_labels")) for line in course]
            == [(line["labels"], line["tokens"], line.get("eval_labels")) for line in courses[1]]
            for course in courses.values()
        ),
        "losses": {str(name): [line["loss"] for line in course] for name, course in courses.items()},
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    sys.exit(0 if result["labels_and_samples_are_the_same"] else 1)


if __name__ == "__main__":
    main()
