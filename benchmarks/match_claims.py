"""What is claimed about endless streams, measured on simulated matches: runs of `svlm eval match`, and a page of them.

    python benchmarks/match_claims.py run MODEL FOLDER --matches 4 --at-once 8
    python benchmarks/match_claims.py run OTHER FOLDER --only trained-apart
    python benchmarks/match_claims.py page FOLDER docs/claims.md

The first films the matches into FOLDER/films and writes FOLDER/NAME.json for each run that is not there yet, but for those of models that were
trained otherwise: these are named, one model a call. The last makes tables and plots of all that are there. With several GPUs, runs take
turns on them.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svlm_jax.demo.film import write_video
from svlm_jax.demo.match import simulate
from svlm_jax.evaluation.match_run import FILM

ROOT = Path(__file__).resolve().parent.parent
LONG, SHORT, FULL = 120.0, 10.0, 20.0  # minutes; full attention holds everything, and so is measured over less

TRAINING = "training"
USUAL = "streaming"  # what all but models that were trained otherwise are compared with

# name -> (group, minutes, flags)
CASES: Mapping[str, tuple[str, float, tuple[str, ...]]] = {
    "streaming": ("modes", LONG, ()),
    "recompute": ("modes", LONG, ("--mode", "recompute")),
    "windows": ("modes", LONG, ("--mode", "windows")),
    "streaming-20": ("modes", FULL, ()),
    "full-20": ("modes", FULL, ("--mode", "full")),
    "streaming-10": ("positions", SHORT, ()),
    "append-10": ("positions", SHORT, ("--positions", "append")),
    "append": ("positions", LONG, ("--positions", "append")),
    "refresh-0": ("older words read anew", LONG, ("--text-refresh", "0")),
    "refresh-1": ("older words read anew", LONG, ("--text-refresh", "1")),
    "refresh-32": ("older words read anew", LONG, ("--text-refresh", "32")),
    "no-text-memory": ("text memory", LONG, ("--text-sink", "0", "--text-sliding", "1")),
    "sink-0": ("text memory", LONG, ("--text-sink", "0")),
    "sink-16": ("text memory", LONG, ("--text-sink", "16")),
    "sink-256": ("text memory", LONG, ("--text-sink", "256")),
    "sliding-64": ("text memory", LONG, ("--text-sliding", "64")),
    "sliding-192": ("text memory", LONG, ("--text-sliding", "192")),
    "sliding-896": ("text memory", LONG, ("--text-sliding", "896")),
    "vision-4": ("vision window", LONG, ("--vision-window", "4", "--text-window", "4")),
    "vision-8": ("vision window", LONG, ("--vision-window", "8", "--text-window", "8")),
    "vision-32": ("vision window", LONG, ("--vision-window", "32", "--text-window", "32")),
    "trained-overlapped": (TRAINING, FULL, ()),
    "trained-apart": (TRAINING, FULL, ()),
    "trained-published": (TRAINING, FULL, ()),
    "blind": ("baselines", LONG, ("--baseline", "blind")),
    "truth": ("baselines", LONG, ("--baseline", "truth")),
}
NOTES = {
    TRAINING: "Three models that are not the bundled one, trained in short from the same weights: with chunks of 24 s that share 12 s in the layout "
    "`streaming`, with chunks that share nothing, and in the layout `published` ([match.md](match.md)).",
}
COLUMNS = {
    "event_f1": "F1 of events",
    "score_accuracy": "scores right",
    "score_update_accuracy": "updates right",
    "answer_accuracy": "answers right",
    "false_words_per_quiet_minute": "false words / quiet minute",
}


def film(task: tuple[int, float, Path]) -> None:
    """A match of so many minutes, if it is not there yet."""
    seed, minutes, path = task
    if not path.exists():
        write_video(simulate(seed, 60 * minutes), path, FILM)


def run(args: argparse.Namespace) -> None:
    """All cases that are not there yet, `at_once` at a time."""
    films = args.folder / "films"
    films.mkdir(parents=True, exist_ok=True)
    tasks = [(seed, LONG * args.scale, films / f"{seed}.mp4") for seed in range(args.seed, args.seed + args.matches)]
    with multiprocessing.get_context("spawn").Pool(min(len(tasks), os.cpu_count() or 1)) as pool:
        pool.map(film, tasks)
    names = args.only or [name for name, (group, _, _) in CASES.items() if group != TRAINING]

    def work(number: int) -> None:
        name = names[number]
        target = args.folder / f"{name}.json"
        if target.exists():
            return
        _, minutes, flags = CASES[name]
        video = films / f"{args.seed}.mp4" if args.matches == 1 else films
        told = ["--minutes", f"{minutes * args.scale:g}", "--seed", str(args.seed), "--matches", str(args.matches), "--video", str(video)]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if args.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % args.gpus)
        command = [sys.executable, "-m", "svlm_jax.cli", "eval", "match", "--model", str(args.model), *told, *flags, "--json", str(target)]
        with open(args.folder / f"{name}.log", "w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
        print(f"{name}: exit code {code}", file=sys.stderr, flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(work, range(len(names))))


def page(args: argparse.Namespace) -> None:
    """Tables and plots of the runs that are there."""
    found = {name: json.loads(path.read_text()) for name in CASES if (path := args.folder / f"{name}.json").exists()}
    if not found:
        sys.exit(f"{args.folder} has no runs: make some with `match_claims.py run`")
    plots = args.page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    lines = [
        "# What is claimed about endless streams, measured",
        "",
        "Simulated matches, which no training has seen ([match.md](match.md) says what the measures are). In brackets: 95% intervals of the mean over "
        "matches, by the spread between them. Round: its median time, all matches as one batch, with other runs beside it.",
        "",
    ]
    for group in dict.fromkeys(group for group, _, _ in CASES.values()):
        names = [name for name in found if CASES[name][0] == group]
        if not names:
            continue
        beside = [USUAL] if USUAL in found and USUAL not in names and group != TRAINING else []
        shown = {name: found[name] for name in [*beside, *names]}
        note = [NOTES[group], ""] if group in NOTES else []
        lines += [f"## {group.capitalize()}", "", *note, *table(shown), "", whence(shown.values()), ""]
        if any("tenths" in each for each in shown.values()):
            plot(shown, plots / f"{group.replace(' ', '_')}.png")
            lines += [f"![over the match]({plots.name}/{group.replace(' ', '_')}.png)", ""]
    args.page.write_text("\n".join(lines), encoding="utf-8")


def whence(records: Iterable[Mapping[str, Any]]) -> str:
    """Which matches, where, from what commits and when."""
    each = list(records)
    seeds = sorted({f"{first} to {last}" for first, *_, last in (2 * record["seeds"] for record in each)})
    found = {key: sorted({record[key] for record in each if record.get(key)}) for key in ("device", "commit", "date")}
    parts = [f"Seeds {', '.join(seeds)}", *found["device"], f"commit {', '.join(found['commit']) or 'unknown'}", " and ".join(found["date"])]
    return "; ".join(parts) + "."


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One row a run; F1 also of the first and the last fifth."""
    rows = [["run", "minutes", *COLUMNS.values(), "F1, first fifth", "F1, last fifth", "round, ms"]]
    for name, each in found.items():
        f1 = [value for value in each["tenths"]["event_f1"]]
        ends = [None if None in pair else sum(pair) / 2 for pair in (f1[:2], f1[-2:])]
        cells = [_cell(each[key], (each.get("intervals") or {}).get(key)) for key in COLUMNS]
        rows.append([name, f"{each['minutes']:g}", *cells, *map(_cell, ends), _cell(each.get("round_ms_p50"), digits=1)])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + " --- |" * len(rows[0]), *body]


def _cell(value: float | None, interval: Sequence[float] | None = None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


def plot(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The measures over the match, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(COLUMNS), figsize=(4 * len(COLUMNS), 3.4), layout="constrained")
    for axis, (key, label) in zip(axes, COLUMNS.items(), strict=True):
        for name, each in found.items():
            tenth = each["minutes"] / 10
            points = [((i + 0.5) * tenth, value) for i, value in enumerate(each["tenths"][key]) if value is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)
        axis.set(title=label, xlabel="minutes")
        if key != "false_words_per_quiet_minute":
            axis.set_ylim(0, 1.02)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="measures")
    runs.add_argument("model", type=Path)
    runs.add_argument("folder", type=Path)
    runs.add_argument("--seed", type=int, default=3, help="of the first match (default: 3)")
    runs.add_argument("--matches", type=int, default=4, help="so many, as one batch (default: 4)")
    runs.add_argument("--at-once", type=int, default=4, help="runs side by side (default: 4)")
    runs.add_argument("--gpus", type=int, default=1, help="that runs take turns on (default: 1)")
    runs.add_argument("--scale", type=float, default=1.0, help="of all lengths, to try it out (default: 1)")
    runs.add_argument("--only", nargs="*", metavar="NAME", choices=tuple(CASES), help="these runs alone")
    runs.set_defaults(work=run)
    pages = commands.add_parser("page", help="makes the page")
    pages.add_argument("folder", type=Path)
    pages.add_argument("page", type=Path)
    pages.set_defaults(work=page)
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.work(args)


if __name__ == "__main__":
    main()
