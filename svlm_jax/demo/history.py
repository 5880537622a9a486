"""Other pasts of the same match: the same pictures, after words that make it hard to guess and easy to look and to count.

A match has few goals. A model that meets each of them again and again soon knows by heart what the score is there, and never learns
to add one to what was said last. As the score is never on the picture, what went before can be made up: the goals that are told
before anything that is remembered are any, and all words from there on follow from them.

A match has ten players, who are named again and again. A model that finds their numbers in what was said before does not read them
off the picture, and one wrong number is repeated for ever. So half of all pasts name other numbers than the picture shows.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np

from svlm_jax.demo.commentary import ROUND, Line, commentate, round_of
from svlm_jax.demo.film import spoken
from svlm_jax.demo.match import CARD_SECONDS, KEEPER, SIDE, Event, Match

MOST = 6  # goals that are made up for a team; its own come on top
BEFORE = 20.0  # seconds of the match's own events before the first remembered word: what is waiting to be said comes from them
MISTAKEN = 0.5  # of all pasts
NEW = 60.0  # seconds that a game begins before the goals that are made up


def with_goals_before(match: Match, time: float, rng: np.random.Generator) -> Match:
    """The match with other goals in the game of `time` up to then, and without all else that happened before."""
    game = match.game(time)
    begin = game.start + CARD_SECONDS
    counts = rng.integers(MOST + 1, size=2)
    teams = rng.permutation(np.repeat([0, 1], counts))
    scorers = (game.shirts[team][int(rng.integers(KEEPER + 1, SIDE))] for team in teams)
    times = np.linspace(begin, time, len(teams) + 2)[1:-1]
    goals = [Event(at, "goal", int(team), number, place="middle") for at, team, number in zip(times.tolist(), teams, scorers, strict=True)]
    return dataclasses.replace(match, events=(*goals, *(event for event in match.events if event.time > time)))


def with_numbers_before(match: Match, first: int, rng: np.random.Generator) -> tuple[Match, Match]:
    """The match as it is told before the round `first`, players taken for others, and as it is told from there on: rightly, but for
    what was said before."""
    numbers = np.array([[0, *rng.permutation(np.arange(1, 10))] for _ in range(2)])

    def taken(team: int | None, number: int | None) -> int | None:
        return number if team is None or number is None else int(numbers[team][number])

    events = tuple(
        dataclasses.replace(each, player=taken(each.team, each.player), other=taken(each.other_team, each.other)) for each in match.events
    )
    shirts = (tuple(tuple(numbers[team][list(game.shirts[team])].tolist()) for team in range(2)) for game in match.games)
    games = tuple(dataclasses.replace(game, shirts=each) for game, each in zip(match.games, shirts, strict=True))
    now = tuple(new if round_of(old.time) < first else old for old, new in zip(match.events, events, strict=True))
    return dataclasses.replace(match, events=events, games=games), dataclasses.replace(match, events=now)


class Pasts:
    """What is said in a match with questions, as chunks of it remember it: each chunk has a past of its own."""

    def __init__(self, match: Match, questions: Mapping[int, str], memory: tuple[int, int]):
        """`memory`: a chunk needs so many first and so many last words of what was said before it, at least."""
        self.match, self.questions = match, questions
        self.lines = commentate(match, questions)
        counts = [len(spoken(self.lines[i]).split()) if i in self.lines else 0 for i in range(math.ceil(match.seconds / ROUND))]
        self.words = [0, *itertools.accumulate(counts)]  # before each round
        self.head = bisect.bisect_left(self.words, memory[0])  # rounds with the first words
        self.tail = memory[1] + memory[1] // 8  # another past may need fewer words: "nobody" is one, a team and a number are two

    def __call__(self, first: int, end: int, rng: np.random.Generator) -> dict[int, Line]:
        """All that matters to the rounds from `first` to `end`: the first lines, the last ones before them, and theirs.

        Goals before are the match's own where the game's beginning is remembered.
        """
        begin = max(0, bisect.bisect_right(self.words, self.words[first] - self.tail) - 1)  # the first round that is remembered
        since = max(0.0, begin * ROUND - BEFORE)
        match = self.match
        if self._game(since) == self._game(begin * ROUND) and since - self._game(since) > NEW:
            match = with_goals_before(match, since, rng)
        else:
            match = dataclasses.replace(match, events=tuple(event for event in match.events if event.time > since - NEW))
        before = now = match
        if rng.random() < MISTAKEN:
            before, now = with_numbers_before(match, first, rng)
        rounds = range(round(since / ROUND), end)
        questions = {i: self.questions[i] for i in rounds if i in self.questions}
        told = {i: line for i, line in commentate(before, questions, rounds).items() if begin <= i < first}
        head = {i: self.lines[i] for i in range(min(self.head, begin)) if i in self.lines}
        return head | told | {i: line for i, line in commentate(now, questions, rounds).items() if i >= first}

    def _game(self, time: float) -> float:
        return self.match.game(time).start
