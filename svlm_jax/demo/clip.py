"""A sample clip for tests: twelve seconds of a ball game, drawn from above. `python -m svlm_jax.demo.clip OUT` writes it again."""

import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 252, 336  # pixels: 9 x 12 tokens of 28, so the model's resizing leaves it alone
FPS = 25
SECONDS = 12.0
SCALE = 3  # drawn this many times larger and shrunk, for smooth edges
METRE = 3.6  # pixels of the clip a metre of the pitch covers
LENGTH, BREADTH = 84.0, 56.0  # metres
GRASS, MOWN, LINE = (46, 125, 62), (54, 137, 70), (232, 240, 232)
TEAMS = (((214, 48, 49), (255, 255, 255)), ((38, 76, 190), (255, 255, 255)))  # (shirt, number)
FORMATION = ((-36, 0), (-24, -13), (-24, 13), (-10, -18), (-9, 1), (-10, 17), (4, -9), (5, 10))  # metres, own goal on the left


def sample_path() -> Path:
    """Where the clip lies."""
    return Path(__file__).with_name("sample.mp4")


def frames(seed: int = 0, seconds: float = SECONDS) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The clip's frames, 25 a second; the same seed gives the same pixels."""
    rng = np.random.default_rng(seed)
    home = np.array([FORMATION, [(-x, y) for x, y in FORMATION]], float)  # [team, player, (x, y)]
    sway = rng.uniform(0.25, 0.6, home.shape), rng.uniform(0, 2 * math.pi, home.shape)  # turns in radians a second, phases
    passes = _passes(rng, home, seconds)
    follow = np.zeros(2)  # where play is, smoothed: the teams and the camera follow it
    for number in range(round(seconds * FPS)):
        now = number / FPS
        wander = 2.6 * np.sin(now * 2 * sway[0] + sway[1])
        players = home + wander + follow * (0.30, 0.22)
        players[:, 0] = home[:, 0] + 0.4 * wander[:, 0] + follow * (0.05, 0.15)  # the keepers stay at home
        ball, height = _ball(passes, now, players)
        follow += (ball - follow) * (1 - math.exp(-1 / (0.9 * FPS)))
        drift = np.array([1.2 * math.sin(0.5 * now), 0.9 * math.sin(0.7 * now + 1)])
        yield _draw(players, ball, height, follow * (0.55, 0.35) + drift)


def _passes(rng: np.random.Generator, home: np.ndarray, seconds: float) -> list[tuple[float, float, tuple[int, int], tuple[int, int]]]:
    """(kicked, received, from, to) in seconds and (team, player); a pass in five goes astray, to the nearest opponent."""
    team, player, now, out = 0, 4, 0.6, []
    while now < seconds:
        to = team if rng.random() > 0.2 else 1 - team
        gap = np.linalg.norm(home[to] - home[team, player], axis=-1)
        near = [i for i in np.argsort(gap) if gap[i] > 4 and i > 0][: 4 if to == team else 1]
        mate = int(rng.choice(near))
        flight = 0.35 + gap[mate] / 26
        out.append((now, now + flight, (team, player), (to, mate)))
        team, player, now = to, mate, now + flight + rng.uniform(0.5, 1.1)
    return out


def _ball(passes, now: float, players: np.ndarray) -> tuple[np.ndarray, float]:
    """The ball's place and its height above the grass, both in metres: at a player's feet, or on its way between two."""
    foot = np.array([1.3, 0.5])
    holder = passes[0][2]
    for kicked, received, source, target in passes:
        if now < kicked:
            break
        if now < received:
            part = (now - kicked) / (received - kicked)
            eased = part * (1.5 - 0.5 * part)  # it leaves fast and slows down
            path = players[source] + (players[target] - players[source]) * eased
            return path + foot, 1.6 * math.sin(math.pi * part)
        holder = target
    return players[holder] + foot, 0.0


def _draw(players: np.ndarray, ball: np.ndarray, height: float, camera: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), (36, 104, 52))
    draw, font, unit = ImageDraw.Draw(image), ImageFont.load_default(7.5 * SCALE), METRE * SCALE
    centre = np.array([WIDTH, HEIGHT]) * SCALE / 2

    def place(x, y):
        return tuple((np.array([x, y]) - camera) * unit + centre)

    def box(x0, y0, x1, y1, **style):
        draw.rectangle([*place(x0, y0), *place(x1, y1)], **style)

    def disc(x, y, radius, **style):
        draw.ellipse([*place(x - radius, y - radius), *place(x + radius, y + radius)], **style)

    half, side, line = LENGTH / 2, BREADTH / 2, {"outline": LINE, "width": round(0.35 * unit)}
    for stripe in range(12):
        box(-half + stripe * 7, -side, -half + (stripe + 1) * 7, side, fill=(GRASS, MOWN)[stripe % 2])
    box(-half, -side, half, side, **line)
    box(-0.17, -side, 0.17, side, fill=LINE)
    disc(0, 0, 8, **line)
    disc(0, 0, 0.6, fill=LINE)
    for end in (-1, 1):
        for depth, reach in ((13, 16), (5, 8)):
            box(min(end * half, end * (half - depth)), -reach, max(end * half, end * (half - depth)), reach, **line)
        box(min(end * half, end * (half + 2)), -4, max(end * half, end * (half + 2)), 4, fill=(205, 214, 205), **line)
    for team, (shirt, ink) in zip(players, TEAMS, strict=True):
        for number, (x, y) in enumerate(team, start=1):
            disc(x + 0.5, y + 0.6, 1.7, fill=(30, 88, 44))
            disc(x, y, 1.7, fill=(240, 190, 40) if number == 1 else shirt, outline=(20, 20, 20), width=SCALE)
            draw.text(place(x, y), str(number), fill=(20, 20, 20) if number == 1 else ink, font=font, anchor="mm")
    disc(ball[0] + 0.3 + height, ball[1] + 0.4 + height, 0.8, fill=(30, 88, 44))
    disc(ball[0], ball[1], 0.85 + 0.15 * height, fill=(255, 255, 255), outline=(20, 20, 20), width=SCALE)
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def write(path: str | Path, seed: int = 0) -> Path:
    """Encodes the clip as H.264 in an MP4 whose header comes first; under 300 kB."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "27", "preset": "veryslow", "g": "50", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number, pixels in enumerate(frames(seed)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m svlm_jax.demo.clip OUT.mp4")
    print(write(sys.argv[1]))
