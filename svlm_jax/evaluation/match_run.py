"""Simulated matches from film to measures: `svlm eval match`."""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svlm_jax.commands.progress import Countdown
from svlm_jax.data.video import probe
from svlm_jax.demo.commentary import commentate, random_questions
from svlm_jax.demo.film import FilmConfig, spoken, write_video
from svlm_jax.demo.match import Event, Match, simulate
from svlm_jax.errors import UserError
from svlm_jax.evaluation.match import KEYS, Said, report
from svlm_jax.files import whole_file

FILM = FilmConfig(fps=4, quality=24)
BLIND = 500_000  # a blind commentator tells the match of a seed that lies so far away
LABELS = {
    "event_precision": "events told that are right",
    "event_recall": "events that are told",
    "event_f1": "F1 of events",
    "timing_error_s": "seconds between an event and its words",
    "score_accuracy": "scores spoken that are right",
    "score_update_accuracy": "goals after which the score is the last one spoken and one more",
    "scorer_accuracy": "last scorers spoken that are right",
    "answer_accuracy": "answers that are right",
    "false_words_per_quiet_minute": "words a minute where nothing happens",
    "repetition": "sentences that repeat the one before",
}


def run(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    seconds = float(round(60 * args.minutes)) or 1.0
    matches = [simulate(args.match_seed + number, seconds) for number in range(args.matches)]
    questions = [random_questions(match, args.question_every) if args.question_every else {} for match in matches]
    begin = time.perf_counter()
    if args.baseline:
        said = [_baseline(args.baseline, match, asked) for match, asked in zip(matches, questions, strict=True)]
        how: dict[str, Any] = {"model": f"baseline {args.baseline}"}
    else:
        with _films(args, matches) as films:
            said, how = _watch(args, settings, films, int(seconds), questions)
    found = report(matches, said)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": os.environ.get("SVLM_COMMIT", ""),
        "command": shlex.join(["svlm", *sys.argv[1:]]),
        "minutes": seconds / 60,
        "seeds": [match.seed for match in matches],
        **how,
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
    }
    print(table(found))
    if args.json:
        with whole_file(args.json) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.captions:
        _write_captions(args.captions, matches, said)
    if args.plot:
        plot({str(how["model"]): found}, Path(args.plot))
    return 0


def table(found: Mapping[str, Any]) -> str:
    """The measures of the whole match, and of its first and last tenth."""
    lines = [f"{'':64}    whole   first    last tenth"]
    for key in KEYS:
        values = (found[key], found["tenths"][key][0], found["tenths"][key][-1])
        lines.append(f"{LABELS[key]:64}" + "".join(f"{'-' if value is None else format(value, '.3f'):>8}" for value in values))
    counts = ", ".join(f"{count} {name}" for name, count in found["counts"].items())
    return "\n".join([*lines, counts])


def plot(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One panel a measure over the tenths of the match, one line a commentary. UserError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib, or leave out --plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 5, figsize=(18, 6.5), layout="constrained")
    for axis, key in zip(axes.flat, KEYS, strict=True):
        for name, each in found.items():
            points = [(10 * i + 5, value) for i, value in enumerate(each["tenths"][key]) if value is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)
        axis.set(title=key, xlabel="% of the match", xlim=(0, 100))
        if key.endswith(("accuracy", "precision", "recall", "f1")):
            axis.set_ylim(0, 1.02)
    axes.flat[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _baseline(name: str, match: Match, questions: Mapping[int, str]) -> list[Said]:
    """Who sees everything, or one who knows the teams and does not look."""
    seen = match if name == "truth" else _renamed(simulate(match.seed + BLIND, match.seconds), match)
    lines = commentate(seen, questions)
    return [Said(index, spoken(lines[index]).strip() if index in lines else "", questions.get(index, "")) for index in range(int(match.seconds))]


def _renamed(other: Match, match: Match) -> Match:
    """What happens in another match, between this one's teams."""
    last = match.games[-1]
    games = [
        dataclasses.replace(theirs, kits=ours.kits, shirts=ours.shirts)
        for theirs, ours in itertools.zip_longest(other.games, match.games[: len(other.games)], fillvalue=last)
    ]

    def number(event: Event, team: int | None, player: int | None) -> int | None:
        at = other.games.index(other.game(event.time))
        return None if team is None or player is None else games[at].shirts[team][other.games[at].shirts[team].index(player)]

    events = [
        dataclasses.replace(event, player=number(event, event.team, event.player), other=number(event, event.other_team, event.other))
        for event in other.events
    ]
    return dataclasses.replace(other, games=tuple(games), events=tuple(events))


@contextlib.contextmanager
def _films(args: argparse.Namespace, matches: Sequence[Match]) -> Iterator[list[Path]]:
    """The matches' films: `--video`, or SEED.mp4 in that folder where there are several; made where they are not there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.video or scratch)
        paths = [folder / f"{match.seed}.mp4" for match in matches] if args.matches > 1 or not args.video else [folder]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        missing = [(match, path) for match, path in zip(matches, paths, strict=True) if not path.exists()]
        for match, path in zip(matches, paths, strict=True):
            if path.exists() and (lasts := probe(path).duration or 0.0) < match.seconds - 1:  # longer ones begin like shorter ones
                raise UserError(f"{path} lasts {lasts:g} s and the match {match.seconds:g} s: it is another film, so give another name")
        if len(missing) == 1:
            with Countdown("filming") as progress:
                write_video(*missing[0], FILM, progress)
        elif missing:
            with multiprocessing.get_context("spawn").Pool(min(len(missing), os.cpu_count() or 1)) as pool, Countdown("filming") as progress:
                for done, _ in enumerate(pool.imap_unordered(_film, missing), 1):
                    progress(done * matches[0].seconds, len(missing) * matches[0].seconds)
        yield paths


def _film(task: tuple[Match, Path]) -> None:
    write_video(*task, FILM)


def _watch(
    args: argparse.Namespace, settings: Mapping[str, Any], films: Sequence[Path], rounds: int, questions: Sequence[Mapping[int, str]]
) -> tuple[list[list[Said]], dict[str, Any]]:
    """(what the model says about each match, what it is and how it ran)."""
    import jax

    from svlm_jax.api import load, stream_config
    from svlm_jax.checkpoints.stream_settings import read_stream_settings
    from svlm_jax.commands.device import mesh_of_flag
    from svlm_jax.evaluation.match_watch import watch
    from svlm_jax.programs import use_compilation_cache

    use_compilation_cache(True)
    if args.model is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    model = load(args.model, dtype=args.dtype, mesh=mesh_of_flag(args.mesh))
    config = stream_config({**read_stream_settings(model.path), **settings})
    with Countdown("commenting") as progress:
        watched = watch(model, films, questions, config, rounds=rounds, told=progress)
    times = sorted(watched.round_seconds) or [0.0]
    told = ("mode", "positions", "vision_window", "text_window", "text_sink", "text_sliding", "text_refresh", "temperature")
    how = {
        "model": str(args.model or "bundled"),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "settings": {name: getattr(config, name) for name in told} | dict(settings),
        "streams": len(films),
        "round_ms_p50": 1e3 * times[len(times) // 2],
        "round_ms_p99": 1e3 * times[len(times) * 99 // 100],
    }
    return watched.said, how


def _write_captions(path: str, matches: Sequence[Match], said: Sequence[Sequence[Said]]) -> None:
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for match, words in zip(matches, said, strict=True):
            lines = commentate(match, {each.round: each.question for each in words if each.question})
            for each in words:
                truth = spoken(lines[each.round]).strip() if each.round in lines else ""
                row = {"seed": match.seed} if len(matches) > 1 else {}
                row |= {"start": each.round, "text": each.text, "truth": truth}
                file.write(json.dumps({**row, "question": each.question} if each.question else row) + "\n")
    print(f"what was said is in {path}", file=sys.stderr)
