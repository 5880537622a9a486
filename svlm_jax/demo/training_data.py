"""Writes matches to train on: videos, and annotation files of overlapping chunks in the published format.

    python -m svlm_jax.demo.training_data FOLDER --matches 32 --minutes 120 --openings 320 --drills 32 --first-seed 1000 --processes 16

`chunks.jsonl` has the whole matches with a question now and then, `dense.jsonl` the half of these chunks with most words, `asked.jsonl` the
whole matches with a question nearly every second, `goals.jsonl` further chunks with a goal and many questions about the score. Each of these
chunks has a past of its own (`demo.history`). `openings.jsonl` has the first 48 seconds of further matches. Of drills (`demo.drill`), which
a model learns to see by, `placed.jsonl` asks after all players' places, `glances.jsonl` the same in chunks of 4 seconds. Seeds below 1000
are for evaluation and are refused here.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from svlm_jax.data.annotations import Annotation
from svlm_jax.data.chunks import ChunkConfig, chunk_times
from svlm_jax.demo.commentary import ASKED, random_questions, round_of
from svlm_jax.demo.drill import asked, drill
from svlm_jax.demo.film import FilmConfig, chunk, chunks, write_annotations, write_video
from svlm_jax.demo.history import Pasts
from svlm_jax.demo.match import Match, simulate

FIRST_SEED = 1_000
OPENING_SECONDS = 48.0
DRILL_SECONDS = 1_800.0
LIGHT = "fastdecode,zerolatency"
STYLES = ("ultrafast", ""), ("superfast", LIGHT), ("veryfast", LIGHT), ("veryfast", "")  # of x264: quick to read, and not all the same
GOALS = 4  # chunks of each goal, which comes between their third second and the sixth from their end
ALL = 96, 480  # first and last words of the previous text that rows can need
SIGHTS = "places", "places", "places", "ball"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Chunks of one kind, and what is asked in them."""

    of: str  # match, opening or drill
    every: float  # seconds between two questions, on average
    kinds: tuple[str, ...] = ASKED
    window: int = 24  # seconds of a chunk
    overlaps: bool = True  # a chunk shares some of it with the next
    memory: tuple[int, int] = ALL  # less where it would be full of places, and rows too long


SETS = {
    "chunks": DataSet("match", 20.0),
    "asked": DataSet("match", 1.25, ("ball", "ball", "score", "scorer")),
    "goals": DataSet("match", 3.0, ("score", "scorer")),
    "openings": DataSet("opening", 6.0),
    "placed": DataSet("drill", 1.2, SIGHTS, memory=(0, 48)),
    "glances": DataSet("drill", 1.0, SIGHTS, window=4, overlaps=False, memory=(0, 0)),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One match."""

    seed: int
    seconds: float
    folder: Path
    kind: str  # match, opening or drill
    overlap: float  # share of a chunk that is in the next as well


def make(task: Task) -> dict[str, list[Annotation]]:
    """Films a match; its rows by data set."""
    match = simulate(task.seed, task.seconds)
    match = drill(match) if task.kind == "drill" else match
    name = f"{task.seed}.mp4"
    preset, tune = STYLES[task.seed % len(STYLES)]
    write_video(match, task.folder / name, FilmConfig(fps=2, quality=25 + task.seed % 6, preset=preset, tune=tune))
    found = {}
    for number, (data_set, each) in enumerate((key, each) for key, each in SETS.items() if each.of == task.kind):
        config = ChunkConfig(each.window, task.overlap * each.window if each.overlaps else 0)
        if task.kind == "drill":
            lines = asked(match, each.every, number, each.kinds)
            found[data_set] = list(chunks(name, match.seconds, lines, config, memory=each.memory))
            continue
        rng = np.random.default_rng([task.seed, 5, number])
        pasts = Pasts(match, random_questions(match, each.every, seed=number, kinds=each.kinds), each.memory)
        times = around_goals(match, each.window, rng) if data_set == "goals" else chunk_times(0.0, match.seconds, config)
        spans = [(round(start), round(end)) for start, end in times]
        found[data_set] = [chunk(name, first, end, pasts(first, end, rng), memory=each.memory) for first, end in spans]
    return found


def around_goals(match: Match, window: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """From when to when chunks of so many seconds last that have a goal, some of each, in order."""
    goals = [round_of(event.time) for event in match.events if event.kind == "goal"]
    starts = sorted(goal - int(rng.integers(3, window - 5)) for goal in goals for _ in range(GOALS))
    return [(float(start), float(start + window)) for start in starts if 0 <= start <= match.seconds - window]


def dense(chunks: list[Annotation]) -> list[Annotation]:
    """The half of the chunks with the most words, in their order."""
    least = sorted(len(chunk.words) for chunk in chunks)[len(chunks) // 2] if chunks else 0
    return [chunk for chunk in chunks if len(chunk.words) >= least]


def write(tasks: Iterable[Task], folder: Path, processes: int) -> dict[str, int]:
    """All matches, so many at a time; rows of each data set."""
    rows: dict[str, list[Annotation]] = {name: [] for name in SETS}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for found in pool.imap(make, tasks):
            for data_set, annotations in found.items():
                rows[data_set] += annotations
    rows["dense"] = dense(rows["chunks"])
    return {name: write_annotations(iter(annotations), folder / f"{name}.jsonl") for name, annotations in rows.items() if annotations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--matches", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=120.0, help="of each match")
    parser.add_argument("--openings", type=int, default=320)
    parser.add_argument("--drills", type=int, default=32, help=f"of {DRILL_SECONDS / 60:g} minutes")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of a chunk that is in the next as well (default: 0.5)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.first_seed < FIRST_SEED:
        parser.error(f"seeds below {FIRST_SEED} are for evaluation")
    args.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    wanted = [("match", 60 * args.minutes)] * args.matches + [("drill", DRILL_SECONDS)] * args.drills + [("opening", OPENING_SECONDS)] * args.openings
    tasks = [Task(args.first_seed + i, seconds, args.folder, kind, args.overlap) for i, (kind, seconds) in enumerate(wanted)]
    counts = write(tasks, args.folder, args.processes)
    size = sum(file.stat().st_size for file in args.folder.glob("*.mp4")) / 1e6
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{told}; {size:.0f} MB of video in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
