"""A simulated match from film to measures: `svlm eval match`."""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svlm_jax.commands.progress import Countdown
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
    match = simulate(args.match_seed, seconds)
    questions = random_questions(match, args.question_every) if args.question_every else {}
    begin = time.perf_counter()
    if args.baseline:
        said, how = _baseline(args, match, questions), {"model": f"baseline {args.baseline}"}
    else:
        with _film(args, match) as video:
            said, how = _watch(args, settings, video, match, questions)
    found = report(match, said)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": os.environ.get("SVLM_COMMIT", ""),
        "command": f"svlm eval match --minutes {args.minutes:g} --seed {args.match_seed}",
        **how,
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
    }
    print(table(found))
    if args.json:
        with whole_file(args.json) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.captions:
        _write_captions(args.captions, match, said, questions)
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


def _baseline(args: argparse.Namespace, match: Match, questions: Mapping[int, str]) -> list[Said]:
    """Who sees everything, or one who knows the teams and does not look."""
    seen = match if args.baseline == "truth" else _renamed(simulate(args.match_seed + BLIND, match.seconds), match)
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
def _film(args: argparse.Namespace, match: Match) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(args.video) if args.video else Path(scratch) / "match.mp4"
        if path.exists():
            from svlm_jax.data.video import probe

            lasts = probe(path).duration or 0.0
            if abs(lasts - match.seconds) > 1:
                raise UserError(f"{path} lasts {lasts:g} s and the match {match.seconds:g} s: it is another film, so give another name")
        else:
            with Countdown("filming") as progress:
                write_video(match, path, FILM, progress)
        yield path


def _watch(
    args: argparse.Namespace, settings: Mapping[str, Any], video: Path, match: Match, questions: Mapping[int, str]
) -> tuple[list[Said], dict[str, Any]]:
    """(what the model says, what it is and how it ran)."""
    import jax

    from svlm_jax.api import Commentary
    from svlm_jax.commands.device import mesh_of_flag
    from svlm_jax.programs import use_compilation_cache

    use_compilation_cache(True)
    if args.model is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    asked = [(index + 0.5, question) for index, question in sorted(questions.items())]
    commentary = Commentary(video, args.model, dtype=args.dtype, mesh=mesh_of_flag(args.mesh), questions=asked, **settings)
    commentary.prepare()
    said, stamps = [], [time.perf_counter()]
    with Countdown("commenting") as progress:
        for each in commentary:
            index = round(each.caption.start)
            said.append(Said(index, each.caption.text, questions.get(index, "")))
            stamps.append(time.perf_counter())
            progress(each.caption.end, match.seconds)
    rounds = sorted(after - before for before, after in itertools.pairwise(stamps[1:])) or [0.0]
    stream = commentary.spec.stream
    told = ("mode", "positions", "vision_window", "text_window", "text_sink", "text_sliding", "temperature")
    how = {
        "model": str(args.model or "bundled"),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "settings": {name: getattr(stream, name) for name in told} | dict(settings),
        "round_ms_p50": 1e3 * rounds[len(rounds) // 2],
        "round_ms_p99": 1e3 * rounds[len(rounds) * 99 // 100],
    }
    return said, how


def _write_captions(path: str, match: Match, said: Sequence[Said], questions: Mapping[int, str]) -> None:
    lines = commentate(match, questions)
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for each in said:
            row = {"start": each.round, "text": each.text, "truth": spoken(lines[each.round]).strip() if each.round in lines else ""}
            file.write(json.dumps({**row, "question": each.question} if each.question else row) + "\n")
    print(f"what was said is in {path}", file=sys.stderr)
