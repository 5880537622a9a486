"""Prompts of random words and visuals, with positions by our rule: what transformers and we are both given."""

import dataclasses
from fractions import Fraction

import numpy as np

from svlm_jax.model.rope import clip_extent, clip_offsets

VOCABULARY, IMAGE, VIDEO, START, END = 320, 300, 301, 302, 303
PARTS = {  # numbers of random words, or (frames, rows, columns) of a visual in merged patches
    "text": (23,),
    "image": (4, (1, 3, 5), 6),
    "clip": (3, (6, 5, 3), 5),
    "odd clip": (3, (5, 4, 4), 5),
    "all": (5, (1, 2, 3), 2, (4, 3, 5), 4, (2, 3, 5), 3),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a family puts a visual into a prompt."""

    step: Fraction = Fraction(1)  # positions between two grids
    side: int = 28  # pixels of a merged patch
    stamp: int = 0  # words before every grid of a clip, each of which is then a visual of its own


RULES = {"qwen2_5_vl": Rule(step=Fraction(2)), "qwen2_vl": Rule(), "qwen3_vl": Rule(side=32, stamp=6)}  # of Qwen2.5-VL: 2 a second, and a grid a second


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, and the frames [F, 3, height, width] of its visuals: one frame is an image, more are a clip."""

    tokens: np.ndarray  # [T]
    positions: np.ndarray  # [T, 3]
    places: np.ndarray  # [C], rows of the pads
    visuals: tuple[np.ndarray, ...]


def prompt(*parts: int | tuple[int, int, int], rule: Rule) -> Prompt:
    rng = np.random.default_rng(0)
    tokens, positions, places, visuals, next_position = [], [], [], [], 0

    def write(ids):
        nonlocal next_position
        tokens.extend(ids)
        positions.extend([(next_position + i,) * 3 for i in range(len(ids))])
        next_position += len(ids)

    for part in parts:
        if isinstance(part, int):
            write(rng.integers(3, 290, part).tolist())
            continue
        frames, height, width = part
        visuals.append(rng.integers(0, 256, (frames, 3, height * rule.side, width * rule.side), dtype=np.uint8))
        depth = -(-frames // 2)
        stamped = rule.stamp and frames > 1
        for grid in [(1, height, width)] * depth if stamped else [(depth, height, width)]:
            write(rng.integers(3, 290, rule.stamp if stamped else 0).tolist())
            write([START])
            count = int(np.prod(grid))
            places.extend(range(len(tokens), len(tokens) + count))
            tokens.extend([IMAGE if frames == 1 else VIDEO] * count)
            positions.extend((next_position + clip_offsets(grid, rule.step, 1)).tolist())
            next_position += clip_extent(grid, rule.step, 1)
            write([END])
    return Prompt(np.array(tokens), np.array(positions, np.int32), np.array(places, np.int32), tuple(visuals))


def prompts(family: str) -> dict[str, Prompt]:
    return {name: prompt(*parts, rule=RULES[family]) for name, parts in PARTS.items()}
