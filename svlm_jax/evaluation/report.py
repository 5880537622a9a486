"""What came of a comparison: win rates with their intervals, ties, votes that were not to be had, and the measures, as JSON and as a table."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svlm_jax.evaluation.intervals import bootstrap, wilson
from svlm_jax.evaluation.journal import Row, write_whole
from svlm_jax.evaluation.judge import Votes
from svlm_jax.evaluation.measures import Measures

DIGITS = 4


@dataclasses.dataclass(frozen=True)
class Judged:
    """One pair with its votes, and the groups that it is counted in."""

    name: str
    video: str
    groups: Mapping[str, str]  # kind of group, such as "sport" -> which of them
    votes: Votes


def tally(judged: Sequence[Judged]) -> Row:
    """Votes and win rate of side A over some pairs. Votes without a verdict count for neither side.

    The interval is Wilson's, with the pairs as cases: the two votes of a pair are on the same texts and are no two cases.
    """
    a, b = (sum(each.votes.count(side) for each in judged) for side in ("a", "b"))
    counted = [each for each in judged if each.votes.count("a") + each.votes.count("b")]
    leads = [each.votes.count("a") - each.votes.count("b") for each in counted]
    unclear = collections.Counter(vote for each in judged for vote in each.votes if vote not in ("a", "b"))
    rate = a / (a + b) if a + b else None
    return {
        "pairs": len(judged),
        "votes_a": a,
        "votes_b": b,
        "refusals": unclear["refusal"],
        "malformed": unclear["malformed"],
        "wins_a": sum(lead > 0 for lead in leads),
        "wins_b": sum(lead < 0 for lead in leads),
        "ties": sum(lead == 0 for lead in leads),
        "undecided": len(judged) - len(counted),
        "first_shown": _first_shown(judged),
        "win_rate_a": None if rate is None else round(rate, DIGITS),
        "wilson_95": _rounded(wilson(rate or 0.0, len(counted))),
    }


def _first_shown(judged: Sequence[Judged]) -> float | None:
    """The share of votes for the commentary that was shown first: 0.5 where the judge does not care."""
    first = sum(each.votes.ab == "a" for each in judged) + sum(each.votes.ba == "b" for each in judged)
    votes = sum(vote in ("a", "b") for each in judged for vote in each.votes)
    return round(first / votes, DIGITS) if votes else None


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]


def comparison(judged: Sequence[Judged]) -> Row:
    """All that is said about the votes: in total, and by each kind of group."""
    total = tally(judged)
    by_video = _grouped(judged, lambda each: each.video)
    votes = [tuple(sum(each.votes.count(side) for each in group) for side in ("a", "b")) for group in by_video.values()]
    total["bootstrap_95"] = _rounded(bootstrap([(a, a + b) for a, b in votes]))
    missing = total["refusals"] + total["malformed"]
    given = total["votes_a"] + total["votes_b"] + missing
    total["if_all_unclear_votes_were"] = {
        "b": round(total["votes_a"] / given, DIGITS) if given else None,
        "a": round((total["votes_a"] + missing) / given, DIGITS) if given else None,
    }
    found: Row = {"total": total}
    for kind in sorted({kind for each in judged for kind in each.groups}):
        groups = _grouped([each for each in judged if kind in each.groups], lambda each, kind=kind: each.groups[kind])
        found[f"by_{kind}"] = {name: tally(group) for name, group in groups.items()}
    found["by_video"] = {name: tally(group) for name, group in by_video.items()}
    return found


def _grouped(judged: Sequence[Judged], key: Callable[[Judged], str]) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for each in judged:
        groups.setdefault(key(each), []).append(each)
    return dict(sorted(groups.items()))


def measures_row(measures: Measures) -> Row:
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in dataclasses.asdict(measures).items()}


def _text(name: str) -> str:
    """As a cell of a table."""
    return " ".join(name.split()).replace("|", "\\|")


def _cell(value: Any, percent: bool = False) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.1%}"
        if percent
        else f"{value:,.2f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def votes_table(report: Row) -> list[str]:
    """Markdown: a line for each group."""
    a, b = report["contestants"]["a"]["name"], report["contestants"]["b"]["name"]
    lines = [
        f"Win rate of {a} over {b}, judged by {report['judge']['model']}",
        "",
        "| | pairs | votes | win rate | 95% (Wilson, pairs) | won | lost | tied | no verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    votes = report["votes"]
    rows = [("all", votes["total"])]
    for kind, groups in votes.items():
        if kind not in ("total", "by_video"):
            rows += [(f"{kind.removeprefix('by_')} {name}", row) for name, row in groups.items()]
    for name, row in rows:
        low, high = row["wilson_95"]
        cells = [
            _text(name),
            _cell(row["pairs"]),
            f"{row['votes_a']:,} : {row['votes_b']:,}",
            _cell(row["win_rate_a"], True),
            f"{low:.1%} to {high:.1%}",
        ]
        cells += [_cell(row["wins_a"]), _cell(row["wins_b"]), _cell(row["ties"]), _cell(row["refusals"] + row["malformed"])]
        lines.append(f"| {' | '.join(cells)} |")
    low, high = votes["total"]["bootstrap_95"]
    first = _cell(votes["total"]["first_shown"], True)
    lines += ["", f"95% by bootstrap over videos: {low:.1%} to {high:.1%}. Votes for what was shown first: {first}."]
    return lines


COLUMNS = (
    ("words_a_second", "words a second", False),
    ("silence", "silence", True),
    ("coverage", "names covered", True),
    ("invented", "names invented", True),
    ("repetition", "repeated phrases", True),
    ("delay", "delay of first mention, s", False),
)


def measures_table(sides: Mapping[str, tuple[str, Row]]) -> list[str]:
    """Markdown: a line for each contestant."""
    lines = [f"| | {' | '.join(title for _, title, _ in COLUMNS)} |", f"|{' --- |' * (len(COLUMNS) + 1)}"]
    for name, row in sides.values():
        lines.append(f"| {_text(name)} | {' | '.join(_cell(row[column], percent) for column, _, percent in COLUMNS)} |")
    return lines


def write_report(folder: Path, report: Row, lines: Sequence[str]) -> None:
    """`report.json` and `report.md`, the same bytes for the same results."""
    write_whole(folder / "report.json", (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
    write_whole(folder / "report.md", ("\n".join(lines) + "\n").encode())
