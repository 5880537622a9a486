"""A ball game seen from above, without end: who moves where, what happens when. One seed is one match.

Five players a side. The ball is with a player, in flight, or waiting at a spot; what is done with it is a script (`_Match._play`) whose
steps are ticks of a tenth of a second, in which all players run towards where they want to be. Every `GAME_SECONDS` of play a new game
begins at 0-0, between other teams on another pitch. Score and last scorer are known to `Match.score` and `Match.last_scorer` alone: no
picture shows them.

Lengths in metres from the middle of the pitch, x to the right and y down; times in seconds. Players are numbered 0 to 9 here,
0 to 4 the team on the left, and by the numbers on their shirts (`Game.shirts`) wherever they are spoken of.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from svlm_jax.types import Float

TICK = 0.1  # seconds
LENGTH, BREADTH = 76.0, 46.0
GOAL, BOX = 5.0, (11.0, 12.0)  # half the mouth of a goal; depth of its box and half its breadth
SIDE = 5  # players of a team
KEEPER = 0  # the place of the one in the goal
REACH = 3.1  # from a player's middle to the ball at the feet
NEAR, TOUCHING = 6.2, 5.4  # players keep so far from one another, and in a duel
SPEED, SPRINT = 5.5, 8.5  # metres a second
GAME_SECONDS = 900.0  # of play
CARD_SECONDS = 5.0  # that the board between two games is shown
GAP = 1.25  # seconds between two events at least
GOAL_EVERY, SCORE_EVERY = (120.0, 215.0), (45.0, 72.0)  # a goal is due so long after the last; a break so long after the last word of the score

KITS = ("red", "blue", "yellow", "white", "black", "orange", "purple", "pink")
ALIKE = ({"red", "orange"}, {"red", "pink"}, {"orange", "yellow"}, {"blue", "purple"}, {"pink", "purple"}, {"white", "yellow"}, {"white", "pink"})
PITCHES = ("grass", "meadow", "clay", "court", "hall", "slate")
FORMATION = ((-34, 0), (-19, -11), (-19, 11), (1, -9), (3, 10))  # of the team on the left: keeper, two backs, two forwards

KINDS = (
    *("new game", "kick-off", "pass", "interception", "tackle", "foul", "free kick", "miss", "save", "goal"),
    *("out", "throw-in", "corner", "goal kick", "break"),
)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened: at `time` a picture taken a quarter of a second later shows it."""

    time: float
    kind: str  # one of KINDS
    team: int | None = None  # 0 is on the left; None where no team did it
    player: int | None = None  # number on the shirt of who did it: passer, tackler, offender, keeper, shooter, taker
    other: int | None = None  # number on the shirt of whom it was done to: receiver, loser of the ball, victim
    other_team: int | None = None
    place: str = ""  # left, right, middle: where on the pitch


@dataclasses.dataclass(frozen=True)
class Game:
    """From one board to the next."""

    start: float
    kits: tuple[str, str]  # colours of the left and the right team
    pitch: str
    shirts: tuple[tuple[int, ...], tuple[int, ...]]  # numbers, from the keeper's on


@dataclasses.dataclass(frozen=True)
class Scene:
    """What there is to see at one tick."""

    players: Float[np.ndarray, "10 2"]
    ball: Float[np.ndarray, "3"]  # x, y, height
    shown: bool  # the ball; it is carried away in breaks
    holder: int  # player with the ball; -1: none
    fallen: int  # player on the ground; -1: none
    carded: int  # player who is shown the card; -1: none
    board: bool  # the board between two games, and nothing else
    camera: Float[np.ndarray, "2"]  # the middle of the picture


@dataclasses.dataclass(frozen=True)
class Match:
    """All that happens in so many seconds."""

    seed: int
    seconds: float
    games: tuple[Game, ...]
    events: tuple[Event, ...]
    scenes: tuple[Scene, ...]  # one a tick

    def game(self, time: float) -> Game:
        return self.games[bisect.bisect_right([game.start for game in self.games], time) - 1]

    def score(self, time: float) -> tuple[int, int]:
        """Goals of the left and the right team in the game of that time, those up to it counted."""
        begin = self.game(time).start
        goals = [event.team for event in self.events if event.kind == "goal" and begin <= event.time <= time]
        return goals.count(0), goals.count(1)

    def last_scorer(self, time: float) -> tuple[int, int] | None:
        """(team, number) of the last goal of the game of that time."""
        begin = self.game(time).start
        goals = [event for event in self.events if event.kind == "goal" and begin <= event.time <= time]
        return (goals[-1].team, goals[-1].player) if goals else None  # type: ignore[return-value]

    def scene(self, time: float) -> Scene:
        """The picture's facts at a time: places between those of two ticks."""
        at = min(max(time / TICK, 0.0), len(self.scenes) - 1.0)
        low = int(at)
        one, two = self.scenes[low], self.scenes[min(low + 1, len(self.scenes) - 1)]
        if one.board != two.board or one.shown != two.shown:
            return one
        part = at - low
        mixed = [a + (b - a) * part for a, b in ((one.players, two.players), (one.ball, two.ball), (one.camera, two.camera))]
        return dataclasses.replace(one, players=mixed[0], ball=mixed[1], camera=mixed[2])


def simulate(seed: int, seconds: float) -> Match:
    """The match of a seed. A longer one begins like a shorter one."""
    return _Match(seed).run(seconds)


def draw_kits(rng: np.random.Generator) -> tuple[str, str]:
    """Two colours that can be told apart."""
    while True:
        left, right = rng.choice(KITS, 2, replace=False).tolist()
        if {left, right} not in ALIKE:
            return left, right


Step = Iterator[None]  # a script: each step is a tick


class _Match:
    """A match as it is played."""

    def __init__(self, seed: int):
        self.seed, self.rng = seed, np.random.default_rng([seed, 1])
        self.now, self.last_event = 0.0, -GAP
        self.games: list[Game] = []
        self.events: list[Event] = []
        self.scenes: list[Scene] = []
        self.home = np.array([*FORMATION, *((-x, y) for x, y in FORMATION)], float)
        self.places, self.speeds = self.home.copy(), np.zeros((2 * SIDE, 2))
        self.goals = self._goals()
        self.ball, self.holder, self.shown = np.zeros(3), -1, True
        self.flight: tuple[np.ndarray, int | np.ndarray, float, float, float] | None = None  # from, to (player or spot), begun, lasts, height
        self.fallen = self.carded = -1
        self.board = False
        self.orders: dict[int, np.ndarray] = {}  # where a player is told to run
        self.duel: set[int] = set()
        self.wander = self.rng.uniform(0.2, 0.55, (2 * SIDE, 2)), self.rng.uniform(0, 2 * math.pi, (2 * SIDE, 2))
        self.shift = np.zeros(2)
        self.gathered = False

    # Time

    def run(self, seconds: float) -> Match:
        script = self._season()
        while self.now < seconds:
            next(script)
        events = tuple(event for event in self.events if event.time < seconds)
        return Match(self.seed, seconds, tuple(game for game in self.games if game.start < seconds), events, tuple(self.scenes))

    def _tick(self) -> None:
        """A tenth of a second: the ball goes on, players run, the camera follows."""
        self._move_ball()
        self.shift += (self.ball[:2] * (0.32, 0.25) - self.shift) * 0.08
        self._move_players()
        if self.holder >= 0:
            self._carry()
        drift = np.array([1.3 * math.sin(0.31 * self.now + self.seed), 1.0 * math.sin(0.43 * self.now + 2 * self.seed)])
        camera = drift + self.shift * (0.12, 0.1)
        self.scenes.append(
            Scene(self.places.copy(), self.ball.copy(), self.shown, self.holder, self.fallen, self.carded, self.board, camera)
        )
        self.now = len(self.scenes) * TICK

    def _wait(self, seconds: float) -> Step:
        for _ in range(max(1, round(seconds / TICK))):
            self._tick()
            yield

    def _tell(self, kind: str, actor: int | None = None, other: int | None = None) -> None:
        """Notes an event of now."""
        shirts = self.games[-1].shirts
        team, player = (None, None) if actor is None else (actor // SIDE, shirts[actor // SIDE][actor % SIDE])
        victim = (None, None) if other is None else (other // SIDE, shirts[other // SIDE][other % SIDE])
        x = self.ball[0] if self.shown else 0.0
        place = "middle" if abs(x) < LENGTH / 6 else "left" if x < 0 else "right"
        self.events.append(Event(self.now, kind, team, player, victim[1], victim[0], place))
        self.last_event = self.now

    def _due(self) -> Step:
        """Waits until another event may happen."""
        yield from self._wait(max(TICK, self.last_event + GAP - self.now))

    # Motion

    def _move_ball(self) -> None:
        if self.flight is None:
            return
        start, target, begun, lasts, height = self.flight
        end = self.places[target] + self._foot(target) if isinstance(target, int) else target
        part = min(1.0, (self.now + TICK - begun) / lasts)
        self.ball[:2] = start + (end - start) * part
        self.ball[2] = height * math.sin(math.pi * part)
        if part >= 1:
            self.ball[2], self.flight = 0.0, None
            self.holder = target if isinstance(target, int) else -1

    def _foot(self, player: int) -> np.ndarray:
        """Where a player has the ball: ahead."""
        return np.array([REACH if player < SIDE else -REACH, 0.6])

    def _carry(self) -> None:
        spot = self.places[self.holder] + self._foot(self.holder)
        self.ball[:2] += np.clip(spot - self.ball[:2], -1.6, 1.6)

    def _kick(self, target: int | np.ndarray, speed: float, height: float = 0.0) -> None:
        """The ball leaves."""
        end = self.places[target] + self._foot(target) if isinstance(target, int) else target
        lasts = max(0.5, float(np.linalg.norm(end - self.ball[:2])) / speed)
        self.flight = (self.ball[:2].copy(), target, self.now, lasts, height)
        self.holder = -1

    def _fly(self, target: int | np.ndarray, speed: float, height: float = 0.0) -> Step:
        """The ball leaves and arrives."""
        self._kick(target, speed, height)
        while self.flight is not None:
            yield from self._wait(TICK)

    def _targets(self) -> np.ndarray:
        wander = 2.4 * np.sin(self.now * 2 * self.wander[0] + self.wander[1])
        targets = self.home + wander + self.shift
        if self.holder >= 0:  # the team with the ball moves up
            mine = slice(0, SIDE) if self.holder < SIDE else slice(SIDE, 2 * SIDE)
            targets[mine, 0] += 7 if self.holder < SIDE else -7
        for keeper in (0, SIDE):
            targets[keeper] = self.home[keeper] + 0.3 * wander[keeper] + (0, np.clip(self.ball[1] * 0.2, -3, 3))
        for player, spot in self.orders.items():
            targets[player] = spot
        return targets

    def _move_players(self) -> None:
        ahead = self._targets() - self.places
        far = np.linalg.norm(ahead, axis=1, keepdims=True)
        limit = np.full((2 * SIDE, 1), SPEED)
        limit[list(self.orders)] = SPRINT
        wanted = ahead / np.maximum(far, 1e-6) * np.minimum(limit, far / 0.5)
        self.speeds += np.clip(wanted - self.speeds, -1.6, 1.6)
        if self.fallen >= 0:
            self.speeds[self.fallen] = 0
        self.places = self.places + self.speeds * TICK
        for _ in range(2):
            gap = self.places[:, None] - self.places[None]
            distance = np.linalg.norm(gap, axis=-1) + np.eye(2 * SIDE) * 99
            least = np.full_like(distance, NEAR)
            for one in self.duel:
                for two in self.duel:
                    least[one, two] = TOUCHING
            push = np.maximum(least - distance, 0) / 2
            self.places = self.places + (gap / np.maximum(distance, 0.1)[..., None] * push[..., None]).sum(axis=1)
        self.places = np.clip(self.places, (-LENGTH / 2 - 1.5, -BREADTH / 2 - 1.5), (LENGTH / 2 + 1.5, BREADTH / 2 + 1.5))

    # The script

    def _season(self) -> Step:
        while True:
            yield from self._open_game()
            yield from self._play()

    def _open_game(self) -> Step:
        """The board, then both teams in their halves."""
        rng = self.rng
        if self.games:
            yield from self._due()
        kits = draw_kits(rng)
        shirts = tuple((1, *rng.choice(np.arange(2, 10), SIDE - 1, replace=False).tolist()) for _ in range(2))  # only keepers' can be guessed
        self.games.append(Game(self.now, kits, str(rng.choice(PITCHES)), shirts))  # type: ignore[arg-type]
        self.board, self.shown, self.holder, self.flight = True, False, -1, None
        self.orders, self.duel, self.fallen, self.carded = {}, set(), -1, -1
        self.places, self.speeds, self.shift = self.home.copy(), np.zeros_like(self.home), np.zeros(2)
        self.ball[:] = 0
        yield from self._wait(0.3)
        self._tell("new game")
        yield from self._wait(CARD_SECONDS)
        self.board, self.shown = False, True
        self.goal_due, self.break_due = self.now + self._goals(), self.now + self._breaks()
        yield from self._kick_off(int(rng.integers(2)))

    def _goals(self) -> float:
        return float(self.rng.uniform(*GOAL_EVERY))

    def _breaks(self) -> float:
        return float(self.rng.uniform(*SCORE_EVERY))

    def _play(self) -> Step:
        end = self.games[-1].start + CARD_SECONDS + GAME_SECONDS
        while self.now < end:
            yield from self._possession(self.holder)

    def _possession(self, player: int) -> Step:
        """What a player does with the ball."""
        rng, team = self.rng, player // SIDE
        attack = 1 if team == 0 else -1
        run = self.places[player] + (attack * rng.uniform(1, 6), rng.uniform(-3, 3))
        bound = (LENGTH / 2 - 7, BREADTH / 2 - 4)
        if player % SIDE:
            self.orders[player] = np.clip(run, (-bound[0], -bound[1]), bound)
        yield from self._wait(rng.uniform(0.7, 1.6))
        yield from self._due()
        self.orders.pop(player, None)
        depth = attack * self.places[player, 0]  # how far forward
        pressing = self.now > self.goal_due
        forward = player % SIDE >= 3
        if forward and depth > (3 if pressing else 8) and (pressing or rng.random() < 0.3):
            yield from self._shot(player, pressing)
            return
        if self.now > self.break_due and rng.random() < 0.6:
            yield from self._out(player)
            return
        chance = rng.random()
        if not player % SIDE or pressing:
            chance = 0.3 + 0.7 * chance  # a keeper only passes, and so does a team that is about to score
        if chance < 0.12:
            yield from self._tackle(player, foul=False)
        elif chance < 0.19:
            yield from self._tackle(player, foul=True)
        elif chance < 0.24:
            yield from self._out(player)
        else:
            yield from self._pass(player, 0.0 if pressing else 0.13)

    def _mate(self, player: int, ahead: float) -> int:
        """Whom to pass to: not too near, rather forward."""
        team = player // SIDE
        attack = 1 if team == 0 else -1
        mates = [mate for mate in range(team * SIDE, team * SIDE + SIDE) if mate != player and (mate % SIDE or player % SIDE in (1, 2))]
        gaps = self.places[mates] - self.places[player]
        far = np.linalg.norm(gaps, axis=1)
        liking = ahead * attack * gaps[:, 0] / 10 - np.abs(far - 18) / 10
        weights = np.exp(liking - liking.max()) * np.where([mate % SIDE for mate in mates], 1.0, 0.12)
        return mates[int(self.rng.choice(len(mates), p=weights / weights.sum()))]

    def _pass(self, player: int, risk: float) -> Step:
        mate = self._mate(player, 1.4 if self.now > self.goal_due else 0.5)
        rivals = np.arange(SIDE) + (0 if player >= SIDE else SIDE)
        between = (self.places[player] + 2 * self.places[mate]) / 3
        rival = int(rivals[1 + np.argmin(np.linalg.norm(self.places[rivals[1:]] - between, axis=1))])
        if self.rng.random() < risk and np.linalg.norm(self.places[rival] - between) < 12:
            self.orders[rival] = between
            yield from self._fly(rival, 17.0, self.rng.choice([0.0, 0.8]))
            self.orders.pop(rival)
            self._tell("interception", rival, player)
            return
        yield from self._fly(mate, 19.0, self.rng.choice([0.0, 0.0, 1.2]))
        self._tell("pass", player, mate)

    def _tackle(self, player: int, *, foul: bool) -> Step:
        """The nearest rival runs at the ball, and wins it or brings the player down."""
        rivals = np.arange(SIDE) + (0 if player >= SIDE else SIDE)
        rival = int(rivals[1 + np.argmin(np.linalg.norm(self.places[rivals[1:]] - self.places[player], axis=1))])
        self.duel = {player, rival}
        self.orders[player] = self.places[player].copy()
        for _ in range(25):
            self.orders[rival] = self.places[player] + self._foot(player) * (1.4, 0) + (0, 3.0)
            yield from self._wait(TICK)
            if np.linalg.norm(self.places[rival] - self.places[player]) < NEAR + 0.3:
                break
        yield from self._due()
        self.orders.clear()
        if foul:
            self.duel = {player, rival}
            self.orders[rival] = self.places[rival].copy()
            self.fallen, self.carded = player, rival
            self._tell("foul", rival, player)
            self.holder = -1
            yield from self._wait(self.rng.uniform(2.2, 3.4))
            self.fallen = self.carded = -1
            self.orders.clear()
            self.duel = set()
            yield from self._restart("free kick", player, self.ball[:2].copy())
            return
        self.holder = rival
        self.ball[:2] = self.places[rival] + self._foot(rival)
        self._tell("tackle", rival, player)
        away = self.places[rival] + (self.places[rival] - self.places[player]) * 1.2
        self.orders[rival] = away
        yield from self._wait(0.8)
        self.orders.clear()
        self.duel = set()

    def _out(self, player: int) -> Step:
        """Over the touch line."""
        side = 1 if self.places[player, 1] > 0 else -1
        spot = np.array([np.clip(self.ball[0] + self.rng.uniform(-9, 9), -30, 30), side * (BREADTH / 2 + 2.2)])
        yield from self._fly(spot, 17.0)
        self._tell("out", player)
        yield from self._dead()
        rivals = np.arange(1, SIDE) + (0 if player >= SIDE else SIDE)
        taker = int(rivals[np.argmin(np.linalg.norm(self.places[rivals] - spot, axis=1))])
        yield from self._restart("throw-in", taker, np.array([spot[0], side * (BREADTH / 2 - 0.5)]))

    def _shot(self, player: int, scores: bool) -> Step:
        rng, team = self.rng, player // SIDE
        attack = 1 if team == 0 else -1
        keeper = SIDE if team == 0 else 0
        if scores:
            spot = np.array([attack * (LENGTH / 2 + 1.6), rng.choice([-1, 1]) * rng.uniform(1.5, GOAL - 1.2)])
            yield from self._fly(spot, 27.0)
            self._tell("goal", player)
            self.goal_due, self.break_due = self.now + self._goals(), self.now + self._breaks()
            corner = np.array([attack * (LENGTH / 2 - 6), rng.choice([-1, 1]) * (BREADTH / 2 - 6)])
            self.orders = {player: corner}
            for i, mate in enumerate(m for m in range(team * SIDE + 1, team * SIDE + SIDE) if m != player):
                self.orders[mate] = corner - (attack * (6.5 + 5.5 * i), 0)
            yield from self._wait(rng.uniform(5, 8))
            self.orders = {}
            yield from self._kick_off(1 - team)
            return
        if rng.random() < 0.55:
            yield from self._fly(keeper, 24.0)
            self._tell("save", keeper, player)
            if rng.random() < 0.4:
                yield from self._due()
                side = rng.choice([-1, 1])
                spot = np.array([attack * (LENGTH / 2 + 2.0), side * rng.uniform(9, 15)])
                yield from self._fly(spot, 15.0)
                yield from self._dead()
                taker = team * SIDE + int(rng.integers(3, SIDE))
                yield from self._restart("corner", taker, np.array([attack * (LENGTH / 2 - 0.5), side * (BREADTH / 2 - 0.5)]))
            return
        spot = np.array([attack * (LENGTH / 2 + 2.2), rng.choice([-1, 1]) * rng.uniform(GOAL + 2.5, GOAL + 8)])
        yield from self._fly(spot, 25.0)
        self._tell("miss", player)
        yield from self._dead()
        yield from self._restart("goal kick", keeper, np.array([attack * (LENGTH / 2 - 6.0), float(rng.uniform(-4, 4))]))

    def _kick_off(self, team: int) -> Step:
        taker = team * SIDE + 3 + int(self.rng.integers(2))
        for player in range(2 * SIDE):
            x, y = self.home[player]
            half = -1 if player < SIDE else 1
            self.orders[player] = np.array([half * max(abs(x), 9.0) if player % SIDE else x, y])
        self.orders[taker] = np.array([-REACH if team == 0 else REACH, -0.6])
        self.ball[:], self.holder = 0, -1
        yield from self._restart("kick-off", taker, np.zeros(2))

    def _restart(self, kind: str, taker: int, spot: np.ndarray) -> Step:
        """The taker walks to the ball, waits, and kicks it to a mate; the kick is the event."""
        self.ball[:2], self.ball[2], self.holder, self.flight = spot, 0.0, -1, None
        self.orders[taker] = spot - self._foot(taker)
        for _ in range(70):
            yield from self._wait(TICK)
            if np.linalg.norm(self.places[taker] - self.orders[taker]) < 1.0:
                break
        self.holder = taker
        yield from self._wait(self.rng.uniform(1.0, 1.8))
        yield from self._due()
        self.orders.clear()
        self._kick(self._mate(taker, 0.2), 16.0, 1.0)
        self._tell(kind, taker)
        while self.flight is not None:
            yield from self._wait(TICK)

    def _dead(self) -> Step:
        """The ball is off the pitch; where a break is due, it is taken: all leave the middle, the ball is carried away."""
        yield from self._wait(self.rng.uniform(1.3, 2.6))
        if self.now < self.break_due:
            return
        self.shown, self.holder, self.flight = False, -1, None
        self.break_due = self.now + self._breaks()
        for player in range(2 * SIDE):
            half = -1 if player < SIDE else 1
            self.orders[player] = np.array([half * (8 + 6.5 * (player % SIDE)), BREADTH / 2 - 2])
        self._tell("break")
        long = self.rng.random() < 0.15
        yield from self._wait(self.rng.uniform(22, 34) if long else self.rng.uniform(6, 11))
        self.orders.clear()
        self.shown = True
