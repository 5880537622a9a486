"""`svlm eval inf-streams`: generate, merge, judge, report; every step is done once, and a run that was killed goes on."""

import argparse
import json
import math
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
from svlm_jax.evaluation.contestants import PUBLISHED, Contestant, showing
from svlm_jax.evaluation.inf_streams import (
    Game,
    Result,
    Segment,
    covers,
    cut_segments,
    merge,
    merged_bytes,
    read_games,
    read_results,
    read_segments,
    said_in,
    shard,
    whole_games,
)
from svlm_jax.evaluation.journal import Row, run_folder, write_whole
from svlm_jax.evaluation.judge import STREAM_PROMPT, Pair, Votes
from svlm_jax.evaluation.measures import measure
from svlm_jax.evaluation.plots import check, plot
from svlm_jax.evaluation.report import Judged, comparison, measures_row, measures_table, votes_table, write_report
from svlm_jax.evaluation.watch import Record, Watch

FIFTHS = ("1 of 5", "2 of 5", "3 of 5", "4 of 5", "5 of 5")


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        print(*_estimate(args), sep="\n")
        return 0
    given, endpoint = sides(args), judge_endpoint(args)
    if args.plots:
        check(Path(args.plots))
    games, segments = _benchmark(args)
    prompt = read_prompt(args.judge_prompt, STREAM_PROMPT)
    folder = Path(args.out)
    with run_folder(folder, {"benchmark": "inf-streams", "metadata": file_digest(Path(args.metadata)), "start": args.start}):
        made = {side: _results(args, given, side, games, folder / side) for side in given}
        results = {side: merged for side, (merged, _) in made.items()}
        report: Row = {"benchmark": "inf-streams", "contestants": described(given), "segments": len(segments)}
        report["coverage"] = {side: _coverage(games, segments, results[side], args.start) | {"refused": made[side][1]} for side in given}
        lines: list[str] = []
        if endpoint is not None:
            asked = [s for s in segments if all(covers(results[side].get(s.video), s) for side in given)]
            if not asked:
                raise UserError("no segment is covered by both sides' results, so there is nothing to judge: check --start and --segments")
            pairs = [Pair(s.name, s.reference, *(said_in(results[side][s.video], s.start, s.end) for side in ("a", "b"))) for s in asked]
            votes = vote(pairs, endpoint, prompt, folder, args.workers, args.price)
            judged = [Judged(s.name, s.video, {"sport": s.sport, "fifth": FIFTHS[s.fifth]}, votes[s.name]) for s in asked]
            report |= {"judge": {"model": endpoint.model, "prompt": digest(prompt)}, "votes": comparison(judged)}
            write_whole(folder / "score_segments.jsonl", _scores(asked, votes, endpoint.model))
            lines += [*votes_table(report), ""]
        measured = {side: measure(games, segments, results[side], {game.name: args.start for game in games}) for side in given}
        report["measures"] = {side: measures_row(whole) for side, (whole, _) in measured.items()}
        report["over_time"] = {side: [measures_row(part) for part in parts] for side, (_, parts) in measured.items()}
        lines += measures_table({side: (given[side].name, report["measures"][side]) for side in given})
        lines += ["", *_coverage_lines(given, report["coverage"], len(segments))]
        write_report(folder, report, lines)
        if args.plots:
            plot("Inf-Streams-Eval", {side: (given[side].name, report["over_time"][side]) for side in given}, Path(args.plots))
    print(*lines, sep="\n")
    return 0


def _benchmark(args: argparse.Namespace) -> tuple[list[Game], list[Segment]]:
    games = whole_games(read_games(Path(args.metadata)))
    if all(game.end <= args.start for game in games):
        raise UserError(f"every game of {args.metadata} ends before --start {args.start:g} s: give a smaller --start")
    if args.segments:
        return games, read_segments(Path(args.segments), games)
    segments = cut_segments(games, args.start, args.segment, args.min_words)
    if args.judge and not segments:
        raise UserError(f"no {args.segment:g} s of the reference have {args.min_words} words: lower --min-words or --start")
    return games, segments


def _watches(args: argparse.Namespace, games: Sequence[Game]) -> list[Watch]:
    """Each game from --start on, whole or in chunks."""
    watches = []
    for game in games:
        length = max(0.0, game.end - args.start)
        step = args.chunk_seconds or length
        for i in range(math.ceil(length / step - 1e-9) if length else 0):
            start = args.start + i * step
            end = min(start + step, float(game.end))
            watches.append(Watch(game.name, str(Path(args.videos, game.video)), start, end, game.before(start)))
    return watches


def _fixed(args: argparse.Namespace) -> Mapping[str, float] | None:
    """What the setting says of how a checkpoint is run."""
    return PUBLISHED if args.setting == "published" else None


def _record(record: Record) -> Row:
    return shard(record.watch.name, record.start, record.end, record.items)


def _results(
    args: argparse.Namespace, given: Mapping[str, Contestant], side: str, games: Sequence[Game], folder: Path
) -> tuple[dict[str, Result], int]:
    """A side's results, merged, and written so where they were made here; and how often a server refused to say anything."""
    who = given[side]
    if who.results is not None:
        return read_results(who.results), 0
    config, endless = run_config(args, given, who, _fixed(args)), args.chunk_seconds is None
    job = Job(
        watches=_watches(args, games),
        config=config,
        showing=showing(args.setting, config.fps, config.max_pixels, args.segment if endless else args.chunk_seconds, endless),
        record=_record,
        partial=True,
        streams=args.streams,
        save_every=args.save_every,
        dtype=args.dtype,
        mesh=args.mesh,
        workers=args.workers,
        patience=patience(args),
        temperature=config.temperature if args.setting == "fair" else None,
        tokenizer=next((each.model for each in given.values() if each.model), None),
    )
    rows = generate(who, job, folder)
    results = merge(rows)
    write_whole(folder / "merged_result.jsonl", merged_bytes(results))
    return results, refusals(rows)


def _coverage(games: Sequence[Game], segments: Sequence[Segment], results: Mapping[str, Result], start: float) -> Row:
    """Which games and segments a side has something for."""
    wanted = [game for game in games if game.end > start]
    gaps = sorted(game.name for game in wanted if game.name in results and results[game.name].missing)
    return {
        "games": sum(game.name in results for game in wanted),
        "of_games": len(wanted),
        "ended_early": sorted(game.name for game in wanted if game.name in results and int(results[game.name].end) < game.end),
        "segments": sum(covers(results.get(segment.video), segment) for segment in segments),
        **({"gaps": gaps} if gaps else {}),
    }


def _coverage_lines(given: Mapping[str, Contestant], found: Mapping[str, Row], segments: int) -> list[str]:
    lines = []
    for side, who in given.items():
        row = found[side]
        early = f"; ended before the reference does: {', '.join(row['ended_early'])}" if row["ended_early"] else ""
        early += f"; shards are missing of: {', '.join(row['gaps'])}" if "gaps" in row else ""
        refused = f"; refused to say anything {row['refused']:,} times" if row["refused"] else ""
        lines.append(
            f"{who.name}: {row['games']:,} of {row['of_games']:,} games, {row['segments']:,} of {segments:,} segments{early}{refused}."
        )
    return lines


def _scores(segments: Sequence[Segment], votes: Mapping[str, Votes], model: str) -> bytes:
    """The votes as the published scorer writes them; a vote without a verdict says why instead of A or B."""
    rows = []
    for s in segments:
        given = votes[s.name]
        a, b = given.count("a"), given.count("b")
        letters = {name: value.upper() if value in ("a", "b") else value for name, value in (("vote_ab", given.ab), ("vote_ba", given.ba))}
        winner = "A" if a > b else "B" if b > a else "equal"
        row = {"video": s.video, "title": s.title, "start": s.start, "end": s.end, "winner": winner, "votes": {"A": a, "B": b}}
        rows.append(json.dumps(row | {"judge": {"model": model, **letters}}, ensure_ascii=False) + "\n")
    return "".join(rows).encode()


def _estimate(args: argparse.Namespace) -> list[str]:
    """What the run would take; of the published benchmark where no metadata is given."""
    given = sides(args)
    config = run_config(args, given, given.get("a"), _fixed(args))
    prompt = read_prompt(args.judge_prompt, STREAM_PROMPT)
    checkpoints = sum(who.model is not None for who in given.values()) if given else 1
    rate = cost.read_rate(Path(args.rates) if args.rates else None, fps=config.fps, streams=args.streams) if checkpoints else None
    if args.metadata is None:
        seconds, count = cost.published(args.start, args.segment)
        length = int(max(args.min_words, cost.LEAST_WORDS) * cost.WORD)
        texts = [(length, length, length)] * count
        head = f"Inf-Streams-Eval as published: {cost.GAMES} games of {cost.GAME_HOURS} h on average, at most {count:,} segments"
        texts_line = f"texts: taken to have {length:,} characters, which is a reference of the fewest words"
        most = cost.judging(prompt, [(cost.LONGEST, cost.LONGEST, cost.LONGEST)] * count)
        told = cost.lines(seconds, rate, cost.judging(prompt, texts), args.price, checkpoints)
        limit = f"       at most {cost.weight(most, args.price)}, if all texts fill the {cost.LONGEST:,} characters that are shown"
        return [head, texts_line, *told, limit, *_as_measured(args, 2 * count)]
    games, segments = _benchmark(args)
    seconds = sum(max(0.0, game.end - args.start) for game in games)
    known = {side: read_results(who.results) for side, who in given.items() if who.results is not None}
    texts = [(len(s.reference), _length(s, known.get("a")), _length(s, known.get("b"))) for s in segments]
    head = f"{args.metadata}: {len(games):,} games, {len(segments):,} segments"
    told = cost.lines(seconds, rate, cost.judging(prompt, texts), args.price, checkpoints)
    return [head, *told, *_as_measured(args, 2 * len(texts))]


def _as_measured(args: argparse.Namespace, questions: int) -> list[str]:
    return cost.as_measured(Path(args.out), questions, args.price) if args.out else []


def _length(segment: Segment, results: Mapping[str, Result] | None) -> int:
    """Characters of what a side says in a segment; as many as the reference has where that is not known yet."""
    if results is None or not covers(results.get(segment.video), segment):
        return len(segment.reference)
    return len(said_in(results[segment.video], segment.start, segment.end))
