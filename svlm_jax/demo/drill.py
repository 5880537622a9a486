"""Pictures to learn seeing from: every second is another moment of a match, with other kits, numbers and another pitch.

In a match the same ten players are named again and again, and who stands where says much about who it is: what could be read off
the picture can be known without. Here it cannot.
"""

import dataclasses

import numpy as np

from svlm_jax.demo.commentary import Line, answer, random_questions
from svlm_jax.demo.match import PITCHES, SIDE, TICK, Game, Match, draw_kits

TAIL = 3  # ticks before a second that belong to it: the ball's tail shows where it was two ticks ago


def drill(match: Match) -> Match:
    """The seconds of a match in another order, each a game of its own; nothing happens in it."""
    rng, size = np.random.default_rng([match.seed, 4]), round(1 / TICK)
    count = len(match.scenes) // size - 1
    order = rng.permutation(count) + 1  # the first has no ticks before it
    scenes = [match.scenes[i] for second in order for i in range(second * size - TAIL, (second + 1) * size - TAIL)]
    games = tuple(Game(float(i), draw_kits(rng), str(rng.choice(PITCHES)), (_numbers(rng), _numbers(rng))) for i in range(count))
    return dataclasses.replace(match, seconds=float(count), games=games, events=(), scenes=(*scenes[TAIL:], *[scenes[-1]] * TAIL))


def _numbers(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.permutation(np.arange(1, 10))[:SIDE].tolist())


def asked(match: Match, every: float, seed: int, kinds: tuple[str, ...]) -> dict[int, Line]:
    """Questions about a drill, and their answers: all that can be said about it."""
    questions = random_questions(match, every, seed=seed, kinds=kinds)
    return {index: Line((), text, answer(match, text, index)) for index, text in questions.items()}
