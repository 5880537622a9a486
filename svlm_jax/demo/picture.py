"""A scene of the match as pixels: pitch, players with their numbers, ball, and the board between two games."""

import functools
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from svlm_jax.demo.match import BOX, BREADTH, GOAL, LENGTH, SIDE, Game, Match
from svlm_jax.types import Float

HEIGHT, WIDTH = 224, 336  # pixels: 8 x 12 merged patches of 28, and 2 x 3 attention windows of 112
METRE = 4.1  # pixels of a picture of that size
RADIUS = 2.8  # metres, of a player's disc: far larger than life, so that numbers can be read
PHASES = 4  # places within a pixel that sprites are drawn for
FINE = 4  # sprites are drawn this many times larger and shrunk, for smooth edges

SHIRTS = {  # kit: (shirt, number)
    "red": ((205, 38, 38), (255, 255, 255)),
    "blue": ((36, 72, 200), (255, 255, 255)),
    "yellow": ((245, 214, 40), (20, 20, 20)),
    "white": ((245, 245, 245), (20, 20, 20)),
    "black": ((22, 22, 26), (255, 255, 255)),
    "orange": ((245, 130, 25), (20, 20, 20)),
    "purple": ((118, 40, 150), (255, 255, 255)),
    "pink": ((250, 150, 195), (20, 20, 20)),
}
GROUNDS = {  # pitch: (turf, mown turf, line)
    "grass": ((46, 125, 62), (54, 137, 70), (232, 240, 232)),
    "meadow": ((92, 140, 62), (101, 150, 70), (240, 240, 226)),
    "clay": ((150, 98, 70), (158, 105, 76), (240, 232, 222)),
    "court": ((52, 112, 128), (58, 120, 136), (236, 240, 240)),
    "hall": ((170, 140, 96), (178, 148, 103), (248, 244, 232)),
    "slate": ((88, 98, 108), (95, 105, 115), (236, 236, 236)),
}
GLOW = (255, 240, 120)


class Painter:
    """Draws the scenes of one match at one size. Grain and light are drawn from the match's seed."""

    def __init__(self, match: Match, height: int = HEIGHT, width: int = WIDTH):
        self.match, self.height, self.width = match, height, width
        self.unit = METRE * min(height / HEIGHT, width / WIDTH)  # pixels a metre
        self.rng = np.random.default_rng([match.seed, 2])
        self.light = round(self.rng.uniform(0.88, 1.08), 2)
        grain = np.repeat(self.rng.normal(0, self.rng.uniform(0.6, 3.0), (2 * height, 2 * width, 1)), 3, axis=2)
        self.grain = tuple(np.clip(np.rint(sign * grain), 0, 20).astype(np.uint8) for sign in (1, -1))  # what it adds, what it takes away

    def __call__(self, time: float) -> UInt8[np.ndarray, "H W 3"]:
        """The picture at that many seconds."""
        match, scene = self.match, self.match.scene(time)
        game = match.game(time)
        if scene.board:
            return self._grained(_board(game, self.height, self.width).copy())
        grounds, margin = _grounds(game.pitch, self.light, self.height, self.width, self.unit)
        corner = np.rint((margin + scene.camera * self.unit) * PHASES).astype(int)  # the camera moves by quarters of a pixel
        (left, top), phase = corner // PHASES, corner % PHASES
        picture = grounds[phase[1]][phase[0]][top : top + self.height, left : left + self.width].copy()
        middle = np.array([self.width, self.height]) / 2 - (corner / PHASES - margin)
        for player in range(2 * SIDE):
            team, place = player // SIDE, middle + scene.players[player] * self.unit
            stamp = _fallen if player == scene.fallen else _player
            _paste(picture, stamp(game.kits[team], game.shirts[team][player % SIDE], team, self.unit), place)
            if player == scene.carded:
                _paste(picture, _card(self.unit), place + np.array([0.0, -1.55 * RADIUS]) * self.unit)
        if scene.shown:
            self._draw_ball(picture, time, scene.ball, middle)
        return self._grained(picture)

    def _draw_ball(self, picture: np.ndarray, time: float, ball: Float[np.ndarray, "3"], middle: np.ndarray) -> None:
        """The ball, its shadow, and a tail that is as long as the ball is fast."""
        before = self.match.scene(time - 0.2)
        if before.shown and not before.board:
            way = before.ball[:2] - ball[:2]
            length = float(np.linalg.norm(way))
            if length > 2.0:
                for part in np.linspace(1, 0.2, 5):
                    _paste(picture, _dot(self.unit, 0.55, GLOW, 0.55 * (1.1 - part)), middle + (ball[:2] + way * part) * self.unit)
        lift = ball[2]
        _paste(picture, _dot(self.unit, 0.9, (0, 0, 0), 0.35), middle + (ball[:2] + np.array([0.3 + lift, 0.4 + lift])) * self.unit)
        _paste(picture, _ball(self.unit, round(lift, 1)), middle + ball[:2] * self.unit)

    def _grained(self, picture: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        y, x = self.rng.integers(self.height), self.rng.integers(self.width)
        here = slice(y, y + self.height), slice(x, x + self.width)
        more, less = self.grain[0][here], self.grain[1][here]
        np.minimum(picture, 255 - more, out=picture)
        picture += more
        np.maximum(picture, less, out=picture)
        picture -= less
        return picture


# What pictures are put together of. Sprites are (colour, opacity) for each place within a pixel.


@functools.lru_cache(16)
def _grounds(pitch: str, light: float, height: int, width: int, unit: float) -> tuple[list[list[np.ndarray]], float]:
    """(the pitch with a margin for the camera, moved up and left by each phase of a pixel [y][x]; the margin in pixels)."""
    turf, mown, line = (tuple(min(255, int(c * light)) for c in colour) for colour in GROUNDS[pitch])
    margin = math.ceil(9 * unit)
    size = width + 2 * margin, height + 2 * margin
    image = Image.new("RGB", (size[0] * 2, size[1] * 2), tuple(int(c * 0.82) for c in turf))
    draw, scale = ImageDraw.Draw(image), unit * 2

    def at(x: float, y: float) -> tuple[float, float]:
        return x * scale + size[0], y * scale + size[1]

    def box(x0: float, y0: float, x1: float, y1: float, **style) -> None:
        draw.rectangle([*at(min(x0, x1), y0), *at(max(x0, x1), y1)], **style)

    half, side, thick = LENGTH / 2, BREADTH / 2, max(2, round(0.4 * scale))
    for stripe in range(10):
        box(-half + stripe * LENGTH / 10, -side, -half + (stripe + 1) * LENGTH / 10, side, fill=(turf, mown)[stripe % 2])
    box(-half, -side, half, side, outline=line, width=thick)
    draw.line([*at(0, -side), *at(0, side)], fill=line, width=thick)
    draw.ellipse([*at(-7, -7), *at(7, 7)], outline=line, width=thick)
    for end in (-1, 1):
        box(end * half, -BOX[1], end * (half - BOX[0]), BOX[1], outline=line, width=thick)
        box(end * half, -GOAL, end * (half + 2.6), GOAL, fill=(200, 208, 200), outline=line, width=thick)
    base = np.asarray(image.resize(size, Image.Resampling.BOX)).astype(np.float32)
    steps = [part / PHASES for part in range(PHASES)]
    rows = [base[:-1] * (1 - part) + base[1:] * part for part in steps]
    return [[(row[:, :-1] * (1 - part) + row[:, 1:] * part).astype(np.uint8) for part in steps] for row in rows], float(margin)


Sprite = tuple[np.ndarray, np.ndarray]  # colour x opacity and 1 - opacity, each float32 [PHASES, PHASES, h, w, 3 or 1]


def _sprite(radius: float, draw_on) -> Sprite:
    """What `draw_on(draw, x, y, scale)` draws around (x, y), at each phase; `radius` in pixels."""
    side = math.ceil(radius) * 2 + 3
    colours, clear = [], []
    for phase in range(PHASES * PHASES):
        image = Image.new("RGBA", (side * FINE, side * FINE), (0, 0, 0, 0))
        middle = [(side // 2 + (part + 0.5) / PHASES) * FINE for part in (phase % PHASES, phase // PHASES)]
        draw_on(ImageDraw.Draw(image), *middle, FINE)
        pixels = np.asarray(image, np.float32)
        opacity = pixels[..., 3:] / 255
        shrink = lambda a: a.reshape(side, FINE, side, FINE, -1).mean((1, 3))  # noqa: E731
        colours.append(shrink(pixels[..., :3] * opacity))
        clear.append(1 - shrink(opacity))
    shape = (PHASES, PHASES, side, side)
    return np.stack(colours).reshape(*shape, 3), np.stack(clear).reshape(*shape, 1)


def _paste(picture: np.ndarray, sprite: Sprite, place: np.ndarray) -> None:
    """Draws a sprite with its middle at (x, y); what lies outside is cut."""
    colour, clear = sprite
    x, y = math.floor(place[0]), math.floor(place[1])
    phase = int((place[1] - y) * PHASES), int((place[0] - x) * PHASES)
    side = colour.shape[2]
    x, y = x - side // 2, y - side // 2
    height, width = picture.shape[:2]
    rows, columns = slice(max(0, -y), min(side, height - y)), slice(max(0, -x), min(side, width - x))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    part = picture[y + rows.start : y + rows.stop, x + columns.start : x + columns.stop]
    part[:] = colour[phase][rows, columns] + part * clear[phase][rows, columns]


@functools.lru_cache(256)
def _player(kit: str, number: int, team: int, unit: float) -> Sprite:
    shirt, ink = SHIRTS[kit]
    r = RADIUS * unit
    font = ImageFont.load_default(1.62 * r * FINE)

    def draw_on(draw: ImageDraw.ImageDraw, x: float, y: float, s: int) -> None:
        draw.ellipse([x - r * s + 1.6 * s, y - r * s + 2 * s, x + r * s + 1.6 * s, y + r * s + 2 * s], fill=(0, 0, 0, 90))
        draw.ellipse([x - r * s, y - r * s, x + r * s, y + r * s], fill=shirt, outline=(15, 15, 15), width=s)
        draw.text((x, y), str(number), fill=ink, font=font, anchor="mm", stroke_width=1, stroke_fill=ink)

    return _sprite(r + 3, draw_on)


@functools.lru_cache(256)
def _fallen(kit: str, number: int, team: int, unit: float) -> Sprite:
    """A player on the ground: flat."""
    shirt, ink = SHIRTS[kit]
    r = RADIUS * unit
    font = ImageFont.load_default(1.2 * r * FINE)

    def draw_on(draw: ImageDraw.ImageDraw, x: float, y: float, s: int) -> None:
        draw.ellipse([x - 1.3 * r * s, y - 0.65 * r * s, x + 1.3 * r * s, y + 0.65 * r * s], fill=shirt, outline=(15, 15, 15), width=s)
        draw.text((x, y), str(number), fill=ink, font=font, anchor="mm", stroke_width=1, stroke_fill=ink)

    return _sprite(1.4 * r + 2, draw_on)


@functools.lru_cache(8)
def _card(unit: float) -> Sprite:
    w, h = 0.75 * unit, 1.05 * unit

    def draw_on(draw: ImageDraw.ImageDraw, x: float, y: float, s: int) -> None:
        draw.rectangle([x - w * s, y - h * s, x + w * s, y + h * s], fill=(255, 225, 0), outline=(10, 10, 10), width=s)

    return _sprite(max(w, h) + 2, draw_on)


@functools.lru_cache(64)
def _ball(unit: float, lift: float) -> Sprite:
    r = (1.15 + 0.2 * lift) * unit

    def draw_on(draw: ImageDraw.ImageDraw, x: float, y: float, s: int) -> None:
        draw.ellipse([x - r * s, y - r * s, x + r * s, y + r * s], fill=(255, 255, 255), outline=(10, 10, 10), width=round(1.2 * s))

    return _sprite(r + 2, draw_on)


@functools.lru_cache(64)
def _dot(unit: float, radius: float, colour: tuple[int, int, int], opacity: float) -> Sprite:
    r = radius * unit

    def draw_on(draw: ImageDraw.ImageDraw, x: float, y: float, s: int) -> None:
        draw.ellipse([x - r * s, y - r * s, x + r * s, y + r * s], fill=(*colour, round(255 * opacity)))

    return _sprite(r + 2, draw_on)


@functools.lru_cache(16)
def _board(game: Game, height: int, width: int) -> np.ndarray:
    """The board between two games: both kits and NEW GAME, and no score."""
    s = height / HEIGHT
    image = Image.new("RGB", (width, height), (18, 24, 40))
    draw = ImageDraw.Draw(image)
    draw.text((width / 2, 0.2 * height), "NEW GAME", fill=(255, 255, 255), font=ImageFont.load_default(30 * s), anchor="mm")
    for kit, side in zip(game.kits, (-1, 1), strict=True):
        x, y, r = width / 2 + side * 0.24 * width, 0.6 * height, 38 * s
        draw.ellipse([x - r, y - r, x + r, y + r], fill=SHIRTS[kit][0], outline=(250, 250, 250), width=max(1, round(2 * s)))
    draw.text((width / 2, 0.6 * height), "v", fill=(255, 255, 255), font=ImageFont.load_default(24 * s), anchor="mm")
    return np.asarray(image)
