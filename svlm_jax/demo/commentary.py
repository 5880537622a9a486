"""What a commentator who sees everything says about a match, and what words claim: one grammar, read both ways.

An event is told in the round whose pictures are the first to show it for at least a quarter of a second (`round_of`). Sentences of a
kind take turns with the seconds of the clock, so that words follow from what is seen and heard: picture, clock, and the words
before. After goals and in breaks the score is spoken in the rounds that follow, and so is the last scorer in breaks.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from svlm_jax.demo.match import SIDE, Event, Game, Match, Scene
from svlm_jax.demo.picture import HEIGHT, METRE, WIDTH

ROUND = 1.0  # seconds
DELAY = 0.75  # an event at t is told in the round that t + DELAY falls into
QUERY = "Commentate on this match"
NUMBERS = ("nil", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WHERE = {"left": "on the left", "right": "on the right", "middle": "in the middle"}

# T, P: team and number of who did it; O: the other's number; U, W: the teams left and right; X, Y: their goals; L: where
EVENT_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "new game": (
        "a new game begins, {U} against {W}.",
        "welcome, it is {U} against {W}.",
        "here we go again, {U} play {W}.",
        "new teams come out, {U} and {W}.",
        "next up we have {U} versus {W}.",
    ),
    "kick-off": (
        "{T} {P} gets the game going.",
        "{T} {P} kicks off.",
        "and we are under way, {T} {P} with the kick-off.",
        "{T} {P} rolls it back from the centre spot.",
        "the whistle goes and {T} {P} starts it.",
    ),
    "pass": (
        "{T} {P} finds {O}.",
        "{T} {P} to {O} {L}.",
        "{T} {P} plays it to {O}.",
        "a neat ball from {T} {P} to {O}.",
        "{T} {P} looks up and picks out {O}.",
    ),
    "interception": (
        "{T} {P} cuts it out.",
        "{T} {P} steps in and intercepts {L}.",
        "that pass is read by {T} {P}.",
        "{T} {P} takes it away from {O}.",
        "poor pass by {O}, {T} {P} has it now.",
    ),
    "tackle": (
        "{T} {P} wins the ball.",
        "a strong tackle by {T} {P}.",
        "{T} {P} robs {O} {L}.",
        "well done {T} {P}, he beats {O} to it.",
        "{T} {P} slides in and comes away with it.",
    ),
    "foul": (
        "foul by {T} {P}.",
        "{T} {P} brings down {O}.",
        "{T} {P} is late, that is a foul {L}.",
        "the card comes out for {T} {P}.",
        "{O} is hurt, {T} {P} is booked.",
    ),
    "free kick": (
        "{T} {P} takes the free kick.",
        "a quick free kick from {T} {P}.",
        "{T} {P} lifts the free kick {L}.",
        "{T} {P} restarts after the foul.",
        "free kick to {T}, taken by {P}.",
    ),
    "miss": (
        "{T} {P} shoots wide.",
        "{T} {P} has a go, but it misses.",
        "a shot from {T} {P}, past the post.",
        "what a chance, {T} {P} puts it wide.",
        "{T} {P} tries his luck and drags it wide.",
    ),
    "save": (
        "saved by {T} {P}.",
        "{T} {P} keeps out the shot from {O}.",
        "a fine stop by {T} {P}.",
        "{O} shoots and {T} {P} holds it.",
        "great hands by {T} {P} to deny {O}.",
    ),
    "goal": (
        "goal! {T} {P} scores!",
        "it is in! a goal for {T} {P}!",
        "{T} {P} finds the net, what a goal!",
        "goal for {T}, {P} with the finish!",
        "{T} {P} buries it, goal!",
    ),
    "out": (
        "{T} {P} puts it out of play.",
        "it runs out, last touch {T} {P}.",
        "over the line it goes from {T} {P}.",
        "{T} {P} loses it over the touch line.",
        "{T} {P} kicks it into the stands {L}.",
    ),
    "throw-in": (
        "{T} {P} throws it in.",
        "throw-in taken by {T} {P}.",
        "a quick throw from {T} {P} {L}.",
        "{T} {P} with the throw.",
        "{T} {P} hurls it back into play.",
    ),
    "corner": (
        "{T} {P} takes the corner.",
        "the corner is swung in by {T} {P}.",
        "corner kick from {T} {P} {L}.",
        "{T} {P} plays the corner short.",
        "{T} {P} sends the corner over.",
    ),
    "goal kick": (
        "{T} {P} takes the goal kick.",
        "goal kick, {T} {P} sends it long.",
        "{T} {P} plays out from the goal.",
        "a goal kick by {T} {P} {L}.",
        "the keeper {T} {P} restarts.",
    ),
    "break": (
        "the players take a break.",
        "a short break for both sides.",
        "time for some water.",
        "they stop for a drink.",
        "we pause for a moment.",
    ),
}
SCORE_SENTENCES = (
    "it is {U} {X}, {W} {Y}.",
    "the score is {U} {X}, {W} {Y}.",
    "that makes it {U} {X}, {W} {Y}.",
    "{U} {X}, {W} {Y} is the score.",
    "we have {U} {X}, {W} {Y}.",
)
SCORER_SENTENCES = (
    "{T} {P} scored last.",
    "the last goal came from {T} {P}.",
    "{T} {P} was the last to score.",
    "last on target was {T} {P}.",
    "it was {T} {P} who scored last.",
)
NO_SCORER_SENTENCES = (
    "no goals so far.",
    "nobody has scored yet.",
    "we wait for the first goal.",
    "still no goals here.",
    "no goal in this game yet.",
)
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "score": ("what is the score?", "tell me the score please."),
    "scorer": ("who scored last?", "who got the last goal?"),
    "ball": ("who has the ball?", "who is on the ball now?"),
    "places": ("who is where?",),  # longer than a round's words in use: for training
}
ASKED = ("score", "scorer", "ball")  # kinds that are asked unless others are wanted
NOBODY = {"scorer": "nobody yet.", "ball": "nobody.", "places": "nobody."}
CELL = 28  # pixels of a picture's columns and rows, as an answer counts them: a merged patch of the model


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a sentence says. Texts as spoken, so that two claims of the same are equal."""

    kind: str  # one of match.KINDS, or score, scorer, no scorer
    team: str | None = None
    player: int | None = None
    other: int | None = None
    teams: tuple[str, str] | None = None  # of a score or a new game
    goals: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """What is said in one round."""

    sentences: tuple[str, ...] = ()
    question: str = ""
    answer: str = ""

    @property
    def words(self) -> str:
        return " ".join(self.sentences)


def round_of(time: float) -> int:
    """The round in which an event of that time is told."""
    return math.floor(time / ROUND + DELAY)


def variant(index: int, choices: tuple[str, ...]) -> str:
    """The sentence for a round: they take turns with the last digit of its second."""
    return choices[index % 10 % len(choices)]


def told(match: Match, event: Event, index: int) -> str:
    """The sentence for an event."""
    kits = match.game(event.time).kits
    return variant(index, EVENT_SENTENCES[event.kind]).format(
        T="" if event.team is None else kits[event.team],
        P="" if event.player is None else NUMBERS[event.player],
        O="" if event.other is None else NUMBERS[event.other],
        U=kits[0],
        W=kits[1],
        L=WHERE[event.place],
    )


def score_text(match: Match, time: float) -> str:
    """As an answer says it."""
    (left, right), (x, y) = match.game(time).kits, match.score(time)
    return f"{left} {NUMBERS[x]}, {right} {NUMBERS[y]}."


def commentate(match: Match, questions: Mapping[int, str] | None = None, rounds: range | None = None) -> dict[int, Line]:
    """Round: what is said, for those of the `rounds` (all) in which something is. `questions`, one of QUESTIONS' texts each, by round.

    Where the first rounds are left out, so is what is still to be said of them.
    """
    said: dict[int, list[str]] = {}
    waiting: list[tuple[int, str]] = []  # (first round, score or scorer), in order
    events = {}
    for event in match.events:
        events.setdefault(round_of(event.time), []).append(event)
    for index in range(math.ceil(match.seconds / ROUND)) if rounds is None else rounds:
        now = index + 1 - DELAY  # events up to here are told
        for event in events.get(index, ()):
            said.setdefault(index, []).append(told(match, event, index))
            if event.kind in ("goal", "new game", "break"):
                waiting = [(index + 1, "score"), *([(index + 1, "scorer")] if event.kind == "break" else [])]
        if index not in said and waiting and waiting[0][0] <= index:
            said[index] = [_memory(match, waiting.pop(0)[1], now, index)]
    asked = questions or {}
    return {
        index: Line(tuple(said.get(index, ())), asked.get(index, ""), answer(match, asked[index], index) if index in asked else "")
        for index in sorted({*said, *asked})
    }


def _memory(match: Match, what: str, now: float, index: int) -> str:
    kits, (x, y), scorer = match.game(now).kits, match.score(now), match.last_scorer(now)
    if what == "score":
        return variant(index, SCORE_SENTENCES).format(U=kits[0], W=kits[1], X=NUMBERS[x], Y=NUMBERS[y])
    if scorer is None:
        return variant(index, NO_SCORER_SENTENCES)
    return variant(index, SCORER_SENTENCES).format(T=kits[scorer[0]], P=NUMBERS[scorer[1]])


def question_kind(question: str) -> str | None:
    """score, scorer or ball; None for any other question."""
    return next((kind for kind, texts in QUESTIONS.items() if question in texts), None)


def answer(match: Match, question: str, index: int) -> str:
    """What is true in a round: of the last picture it shows, and of the events told up to it. ValueError where it is not known."""
    kind, now = question_kind(question), index + 1 - DELAY
    if kind is None:
        raise ValueError(f"nobody knows the answer to {question!r}")
    if kind == "score":
        return score_text(match, now)
    kits = match.game(now).kits
    if kind == "scorer":
        scorer = match.last_scorer(now)
        return NOBODY["scorer"] if scorer is None else f"{kits[scorer[0]]} {NUMBERS[scorer[1]]}."
    scene, game = match.scene(index + ROUND / 2), match.game(index + ROUND / 2)
    if scene.board or (kind == "ball" and scene.holder < 0):
        return NOBODY[kind]
    return f"{_player(game, scene.holder)}." if kind == "ball" else f"{places(game, scene)}."


def _player(game: Game, player: int) -> str:
    team, place = divmod(player, SIDE)
    return f"{game.kits[team]} {NUMBERS[game.shirts[team][place]]}"


def places(game: Game, scene: Scene) -> str:
    """Column and row of the ball, and column, row, team and number of every player, by columns and rows."""
    size = np.array([WIDTH, HEIGHT])
    spots = np.vstack([scene.players, scene.ball[:2]]) - scene.camera
    cells = np.clip((size / 2 + METRE * spots) // CELL, 0, size // CELL - 1).astype(int) + 1
    said = [f"{NUMBERS[column]} {NUMBERS[row]}" for column, row in cells]
    order = sorted(range(2 * SIDE), key=lambda player: tuple(cells[player]))
    ball = [f"ball {said[-1]}"] if scene.shown else []
    return " ".join([*ball, *(f"{said[player]} {_player(game, player)}" for player in order)])


def random_questions(match: Match, every: float, seed: int = 0, kinds: tuple[str, ...] = ASKED) -> dict[int, str]:
    """Questions in random rounds, `every` seconds on average and at most one a round; not in a match's first seconds."""
    rng = np.random.default_rng([match.seed, 3, seed])
    asked = {}
    for index in range(3, math.ceil(match.seconds / ROUND)):
        if rng.random() < ROUND / every:
            texts = QUESTIONS[str(rng.choice(kinds))]
            asked[index] = texts[int(rng.integers(len(texts)))]
    return asked


# Words back to claims


def sentences_of(text: str) -> list[str]:
    """The sentences of what was said, each with the sign it ends with."""
    return [part.strip() for part in re.findall(r"[^.!?]+[.!?]+|[^.!?]+$", text.replace("...", " ")) if part.strip()]


def claims(text: str) -> Iterator[tuple[str, Claim | None]]:
    """(sentence, what it claims; None where the grammar has no such sentence) of what was said in a round."""
    parts = sentences_of(text)
    while parts:
        for count in (2, 1):  # "goal! red four scores!" is one sentence of the grammar
            found = _claim(" ".join(parts[:count])) if len(parts) >= count else None
            if found is not None:
                yield " ".join(parts[:count]), found
                parts = parts[count:]
                break
        else:
            yield parts[0], None
            parts = parts[1:]


def _claim(sentence: str) -> Claim | None:
    for kind, pattern in _patterns():
        match = pattern.fullmatch(sentence)
        if match is None:
            continue
        g = match.groupdict()
        teams = (g["U"], g["W"]) if g.get("U") else None
        goals = (NUMBERS.index(g["X"]), NUMBERS.index(g["Y"])) if g.get("X") else None
        number = {key: NUMBERS.index(g[key]) if g.get(key) else None for key in ("P", "O")}
        return Claim(kind, g.get("T"), number["P"], number["O"], teams, goals)
    return None


@functools.cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    number, where = "|".join(NUMBERS), "|".join(WHERE.values())
    groups = {key: rf"(?P<{key}>[a-z]+)" for key in "TUW"} | {key: f"(?P<{key}>{number})" for key in "POXY"} | {"L": f"(?P<L>{where})"}
    tables = {**EVENT_SENTENCES, "score": SCORE_SENTENCES, "scorer": SCORER_SENTENCES, "no scorer": NO_SCORER_SENTENCES}
    return tuple((kind, re.compile(re.escape(text).replace(r"\{", "{").replace(r"\}", "}").format(**groups)))
                 for kind, texts in tables.items() for text in texts)


def answer_claim(text: str) -> str:
    """An answer, comparable: lower case, single spaces, no full stop."""
    return re.sub(r"\s+", " ", text.strip().lower().rstrip("."))
