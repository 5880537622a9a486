"""`svlm eval livesports`: generate, merge, judge, report, as for Inf-Streams-Eval; the win rate is over two votes an event."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from svlm_jax.errors import UserError
from svlm_jax.evaluation import cost
from svlm_jax.evaluation.compare import (
    Job,
    described,
    digest,
    file_digest,
    generate,
    judge_endpoint,
    patience,
    read_prompt,
    refusals,
    run_config,
    sides,
    vote,
)
from svlm_jax.evaluation.contestants import Contestant, showing
from svlm_jax.evaluation.journal import Row, run_folder, write_whole
from svlm_jax.evaluation.judge import EVENT_PROMPT, Pair
from svlm_jax.evaluation.livesports import Event, Key, as_results, merge, predictions_bytes, read_events, read_results, result_row
from svlm_jax.evaluation.measures import measure
from svlm_jax.evaluation.plots import check, plot
from svlm_jax.evaluation.report import Judged, comparison, measures_row, measures_table, votes_table, write_report
from svlm_jax.evaluation.watch import Record, Watch


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        print(*_estimate(args), sep="\n")
        return 0
    given, endpoint = sides(args), judge_endpoint(args)
    if args.plots:
        check(Path(args.plots))
    events = read_events(Path(args.events))
    prompt = read_prompt(args.judge_prompt, EVENT_PROMPT)
    folder = Path(args.out)
    with run_folder(folder, {"benchmark": "livesports", "events": file_digest(Path(args.events))}):
        made = {side: _results(args, given, side, events, folder / side) for side in given}
        said = {side: merged for side, (merged, _) in made.items()}
        report: Row = {"benchmark": "livesports", "contestants": described(given), "events": len(events)}
        report["coverage"] = {
            side: {"events": sum(event.key in said[side] for event in events), "refused": made[side][1]} for side in given
        }
        lines: list[str] = []
        if endpoint is not None:
            asked = [event for event in events if all(event.key in said[side] for side in given)]
            if not asked:
                raise UserError("no event is in both sides' results, so there is nothing to judge: give results for these events")
            pairs = [Pair(event.name, event.reference, said["a"][event.key], said["b"][event.key]) for event in asked]
            votes = vote(pairs, endpoint, prompt, folder, args.workers, args.price)
            judged = [Judged(event.name, event.video_id, {"sport": event.sport}, votes[event.name]) for event in asked]
            report |= {"judge": {"model": endpoint.model, "prompt": digest(prompt)}, "votes": comparison(judged)}
            lines += [*votes_table(report), ""]
        starts = {event.name: event.begin for event in events}
        games, segments = [event.game() for event in events], [event.segment() for event in events]
        measured = {side: measure(games, segments, as_results(events, said[side]), starts, bins=1) for side in given}
        report["measures"] = {
            side: measures_row(whole) | {"delay": None, "delays": 0} for side, (whole, _) in measured.items()
        }  # no times in rows
        lines += measures_table({side: (given[side].name, report["measures"][side]) for side in given})
        lines += ["", *(f"{who.name}: {report['coverage'][side]['events']:,} of {len(events):,} events." for side, who in given.items())]
        write_report(folder, report, lines)
        if args.plots:
            plot("LiveSports-3K-CC", {side: (given[side].name, [report["measures"][side]]) for side in given}, Path(args.plots))
    print(*lines, sep="\n")
    return 0


def _results(
    args: argparse.Namespace, given: Mapping[str, Contestant], side: str, events: Sequence[Event], folder: Path
) -> tuple[dict[Key, str], int]:
    """What a side says about each event, written as a result file where it was made here; and how often a server refused to."""
    who = given[side]
    if who.results is not None:
        return read_results(who.results), 0
    config = run_config(args, given, who)
    by_name = {event.name: event for event in events}

    def record(made: Record) -> Row:
        return result_row(by_name[made.watch.name], made.items)

    def query(event: Event) -> str:
        return f"{config.query}: {event.title}" if event.title else config.query

    job = Job(
        watches=[Watch(e.name, str(Path(args.videos, e.video)), e.begin, e.end, e.previous, query(e)) for e in events],
        config=config,
        showing=showing("fair", config.fps, config.max_pixels, max(e.end - e.begin for e in events), endless=False),
        record=record,
        partial=False,
        streams=args.streams,
        save_every=args.save_every,
        dtype=args.dtype,
        mesh=args.mesh,
        workers=args.workers,
        patience=patience(args),
        temperature=config.temperature,
        tokenizer=next((each.model for each in given.values() if each.model), None),
    )
    rows = generate(who, job, folder)
    said = merge(rows)
    write_whole(folder / "predictions.jsonl", predictions_bytes(events, said))
    return said, refusals(rows)


def _estimate(args: argparse.Namespace) -> list[str]:
    given = sides(args)
    config = run_config(args, given, given.get("a"))
    prompt = read_prompt(args.judge_prompt, EVENT_PROMPT)
    events = read_events(Path(args.events))
    checkpoints = sum(who.model is not None for who in given.values()) if given else 1
    rate = cost.read_rate(Path(args.rates) if args.rates else None, fps=config.fps, streams=args.streams) if checkpoints else None
    known = {side: read_results(who.results) for side, who in given.items() if who.results is not None}

    def length(event: Event, side: str) -> int:
        return len(known[side][event.key]) if event.key in known.get(side, {}) else len(event.reference)

    texts = [(len(event.reference), length(event, "a"), length(event, "b")) for event in events]
    seconds = sum(event.end - event.begin for event in events)
    told = [f"{args.events}: {len(events):,} events", *cost.lines(seconds, rate, cost.judging(prompt, texts), args.price, checkpoints)]
    return [*told, *(cost.as_measured(Path(args.out), 2 * len(texts), args.price) if args.out else [])]
