"""Prompts of random words and visuals, with positions by our rule: what transformers and we are both given."""

import dataclasses
from fractions import Fraction

import numpy as np

from svlm_jax.model.rope import clip_extent, clip_offsets

VOCABULARY, IMAGE, VIDEO, START, END = 320, 300, 301, 302, 303
STEPS = {"qwen2_5_vl": Fraction(2), "qwen2_vl": Fraction(1)}  # positions between two grids: 2 a second, and a grid a second; or one a grid
PARTS = {  # numbers of random words, or (frames, height, width) of a visual in pixels
    "text": (23,),
    "image": (4, (1, 84, 140), 6),
    "clip": (3, (6, 140, 84), 5),
    "odd clip": (3, (5, 112, 112), 5),
    "all": (5, (1, 56, 84), 2, (4, 84, 140), 4, (2, 84, 140), 3),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, and the frames [F, 3, height, width] of its visuals: one frame is an image, more are a clip."""

    tokens: np.ndarray  # [T]
    positions: np.ndarray  # [T, 3]
    places: np.ndarray  # [C], rows of the pads
    visuals: tuple[np.ndarray, ...]


def prompt(*parts: int | tuple[int, int, int], step: Fraction) -> Prompt:
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
        visuals.append(rng.integers(0, 256, (frames, 3, height, width), dtype=np.uint8))
        grid = (-(-frames // 2), height // 28, width // 28)
        write([START])
        count = int(np.prod(grid))
        places.extend(range(len(tokens), len(tokens) + count))
        tokens.extend([IMAGE if frames == 1 else VIDEO] * count)
        positions.extend((next_position + clip_offsets(grid, step, 1)).tolist())
        next_position += clip_extent(grid, step, 1)
        write([END])
    return Prompt(np.array(tokens), np.array(positions, np.int32), np.array(places, np.int32), tuple(visuals))


def prompts(family: str) -> dict[str, Prompt]:
    return {name: prompt(*parts, step=STEPS[family]) for name, parts in PARTS.items()}
