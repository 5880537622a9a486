"""Scores commentary of a simulated match against what really happened: no judge, every number counts something.

An event counts where its kind, team and player are right within a second; each event and each claim is matched once. Times of claims are
the beginnings of the rounds they are made in. A sentence that the grammar does not have is a claim that matches nothing.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from svlm_jax.demo.commentary import DELAY, Claim, Line, answer, answer_claim, claims, commentate, round_of
from svlm_jax.demo.match import KINDS, Event, Match
from svlm_jax.evaluation.intervals import mean_interval

TOLERANCE = 1.0  # seconds
PARTS = 10
KEYS = (
    *("event_precision", "event_recall", "event_f1", "timing_error_s", "score_accuracy", "score_update_accuracy", "scorer_accuracy"),
    *("answer_accuracy", "false_words_per_quiet_minute", "repetition"),
)
COUNTED = {"claims": "claim", "scores": "score", "goals": "update", "answers": "answer"}  # name -> key of a finding


@dataclasses.dataclass(frozen=True)
class Said:
    """What was said in one round."""

    round: int  # begins at so many seconds
    text: str
    question: str = ""

    @property
    def answer(self) -> str:
        """To the round's question: its first line."""
        return self.text.split("\n", 1)[0] if self.question else ""

    @property
    def words(self) -> str:
        """All but the answer."""
        return self.text.partition("\n")[2] if self.question else self.text


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that counts: when, for what, and how much of it is right."""

    time: float  # seconds
    key: str  # claim, event, timing, score, update, scorer, answer, quiet, false, sentence, repeated
    value: float


def findings(match: Match, said: Sequence[Said]) -> list[Finding]:
    """Everything that can be counted of a commentary, to be summed up over any part of the match."""
    rounds = sorted(said, key=lambda each: each.round)
    claimed = [(each.round, claim) for each in rounds for _, claim in claims(each.words)]
    found = [*_events(match, claimed), *_scores(match, claimed), *_updates(match, claimed)]
    for each in rounds:
        if each.question:
            right = answer_claim(each.answer) == answer_claim(answer(match, each.question, each.round))
            found.append(Finding(each.round, "answer", right))
    return [*found, *_quiet(match, rounds), *_repetition(rounds)]


def _same(event: Event, claim: Claim, match: Match) -> bool:
    """Whether a claim names this event: kind, and team and player or both teams."""
    kits = match.game(event.time).kits
    if claim.kind != event.kind:
        return False
    if event.kind == "new game":
        return claim.teams == kits
    return event.team is None or (claim.team == kits[event.team] and claim.player == event.player)


def _events(match: Match, claimed: Sequence[tuple[int, Claim | None]]) -> list[Finding]:
    found = []
    free = {i: event for i, event in enumerate(match.events) if round_of(event.time) < match.seconds}  # the others are told after its end
    times = [event.time for event in match.events]
    for time, claim in claimed:
        if claim is not None and claim.kind not in KINDS:
            continue
        hit = None
        if claim is not None:
            first, last = bisect.bisect_left(times, time - TOLERANCE), bisect.bisect_right(times, time + TOLERANCE)
            near = [i for i in range(first, last) if i in free and _same(match.events[i], claim, match)]
            hit = min(near, key=lambda i: abs(times[i] - time), default=None)
        found.append(Finding(time, "claim", hit is not None))
        if hit is not None:
            found += [Finding(times[hit], "event", 1.0), Finding(times[hit], "timing", abs(times[hit] - time))]
            del free[hit]
    return [*found, *(Finding(event.time, "event", 0.0) for event in free.values())]


def _scores(match: Match, claimed: Sequence[tuple[int, Claim | None]]) -> list[Finding]:
    found = []
    for time, claim in claimed:
        now = time + 1 - DELAY
        if claim is not None and claim.kind == "score":
            right = claim.teams == match.game(now).kits and claim.goals == match.score(now)
            found.append(Finding(time, "score", right))
        if claim is not None and claim.kind in ("scorer", "no scorer"):
            scorer, kits = match.last_scorer(now), match.game(now).kits
            right = claim.kind == "no scorer" if scorer is None else (claim.team, claim.player) == (kits[scorer[0]], scorer[1])
            found.append(Finding(time, "scorer", right))
    return found


def _updates(match: Match, claimed: Sequence[tuple[int, Claim | None]]) -> list[Finding]:
    """For each goal: whether the next score that is spoken is the last one that was, plus this goal."""
    spoken = [(time, claim) for time, claim in claimed if claim is not None and claim.kind == "score"]
    times = [time for time, _ in spoken]
    goals = [event for event in match.events if event.kind == "goal"]
    found = []
    for event, after in zip(goals, [*(goal.time for goal in goals[1:]), math.inf], strict=False):
        at = bisect.bisect_left(times, event.time - TOLERANCE)  # the first one behind it
        if at == len(times) and event.time > match.seconds - 3:
            continue  # the match ended before it could be said
        right = False
        if 0 < at < len(times) and times[at] < after and times[at - 1] >= match.game(event.time).start - TOLERANCE:
            before, now = spoken[at - 1][1].goals, spoken[at][1].goals
            assert before is not None and now is not None
            plus = (int(event.team == 0), int(event.team == 1))
            right = now == (before[0] + plus[0], before[1] + plus[1])
        found.append(Finding(event.time, "update", right))
    return found


def _quiet(match: Match, rounds: Sequence[Said]) -> list[Finding]:
    """Words in rounds in which, as in those before and after, there is nothing to say."""
    lines: Mapping[int, Line] = commentate(match)
    busy = {index + shift for index in lines for shift in (-1, 0, 1)}
    quiet = [each for each in rounds if each.round not in busy]
    return [finding for each in quiet for finding in (Finding(each.round, "quiet", 1.0), Finding(each.round, "false", len(each.words.split())))]


def _repetition(rounds: Sequence[Said]) -> list[Finding]:
    """Whether a sentence is the same as the one before it."""
    found, before = [], None
    for each in rounds:
        for sentence, _ in claims(each.words):
            found.append(Finding(each.round, "sentence", sentence == before))
            before = sentence
    return found


def summary(found: Sequence[Finding]) -> dict[str, float | None]:
    """The measures of some findings; None where there is nothing to measure."""
    values: dict[str, list[float]] = {}
    for each in found:
        values.setdefault(each.key, []).append(float(each.value))

    def mean(key: str) -> float | None:
        return sum(values[key]) / len(values[key]) if values.get(key) else None

    precision, recall = mean("claim"), mean("event")
    f1 = None if precision is None or recall is None else 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
    quiet = len(values.get("quiet", ())) / 60
    return {
        "event_precision": precision,
        "event_recall": recall,
        "event_f1": f1,
        "timing_error_s": mean("timing"),
        "score_accuracy": mean("score"),
        "score_update_accuracy": mean("update"),
        "scorer_accuracy": mean("scorer"),
        "answer_accuracy": mean("answer"),
        "false_words_per_quiet_minute": sum(values.get("false", ())) / quiet if quiet else None,
        "repetition": mean("sentence"),
    }


def report(matches: Sequence[Match], said: Sequence[Sequence[Said]]) -> dict[str, Any]:
    """The measures of whole commentaries, counted together; `tenths`: each of them over the ten parts of the matches.

    With several matches also `matches`, the measures of each alone, and `intervals`: where 95% of the means of as many other matches
    would lie, by the spread between these (Student's t).
    """
    parts: list[list[Finding]] = [[] for _ in range(PARTS)]
    each: list[dict[str, float | None]] = []
    for match, words in zip(matches, said, strict=True):
        found = findings(match, words)
        each.append(summary(found))
        for finding in found:
            parts[min(PARTS - 1, int(finding.time * PARTS / match.seconds))].append(finding)
    whole, tenths = [finding for part in parts for finding in part], [summary(part) for part in parts]
    counts = {"events": sum(len(match.events) for match in matches)}
    counts |= {name: sum(finding.key == key for finding in whole) for name, key in COUNTED.items()}
    told: dict[str, Any] = {**summary(whole), "tenths": {key: [part[key] for part in tenths] for key in KEYS}, "counts": counts}
    if len(matches) > 1:
        shares = {key: (0.0, math.inf if key in ("timing_error_s", "false_words_per_quiet_minute") else 1.0) for key in KEYS}
        told["intervals"] = {key: mean_interval([one[key] for one in each], *limits) for key, limits in shares.items()}
        told["matches"] = each
    return told
