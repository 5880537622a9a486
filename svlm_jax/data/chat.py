"""Chat prompts of text, images and clips, laid out as tokens, positions and places. NumPy only."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from svlm_jax.config import VisionConfig
from svlm_jax.errors import UserError
from svlm_jax.model.rope import clip_extent, clip_offsets
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Image:
    """A still picture, already at the model's size."""

    frame: np.ndarray  # uint8 [3, height, width], both sides multiples of 28


@dataclasses.dataclass(frozen=True)
class Clip:
    """A run of frames, already at the model's size."""

    frames: np.ndarray  # uint8 [F, 3, height, width]
    fps: float = 2.0  # frames a second


Part = str | Image | Clip


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """What the model is given: `forward` and `generate` take these arrays."""

    tokens: np.ndarray  # int32 [T], vision pads included
    positions: np.ndarray  # int32 [T, 3] in units of 1/unit
    unit: int
    visuals: tuple[np.ndarray, ...]  # uint8 [F, 3, height, width] each, in order; an image is one frame
    places: np.ndarray  # int32 [C]: rows of the vision pads
    end: int  # first free position, in units


def _visual(part: Image | Clip, vision: VisionConfig) -> tuple[np.ndarray, tuple[int, int, int], Fraction]:
    frames = part.frame[None] if isinstance(part, Image) else part.frames
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise UserError(f"a picture must be uint8 with shape [3, height, width] (a clip [F, 3, height, width]), not {frames.dtype} {frames.shape}")
    side = vision.merged_patch_size
    height, width = frames.shape[2:]
    if height % side or width % side or not height or not width:
        raise UserError(f"a picture of {height}x{width} pixels: both sides must be multiples of {side} (see data.resize)")
    step = Fraction(1)
    if isinstance(part, Clip):
        if not (part.fps > 0 and math.isfinite(part.fps)):
            raise UserError(f"a clip's fps must be positive, not {part.fps}")
        if vision.tokens_per_second:
            step = Fraction(vision.tokens_per_second) * vision.temporal_patch_size / Fraction(part.fps).limit_denominator(1000)
    return frames, (-(-len(frames) // vision.temporal_patch_size), height // side, width // side), step


def lay_out(parts: Sequence[Part], tokenizer: Tokenizer, layout: PromptLayout, vision: VisionConfig) -> ChatPrompt:
    """The prompt's tokens and positions: text counts on, a visual spans (time, row, column) from its base.

    Text is encoded with its special tokens (`<|im_start|>` and so on), as chat templates write them; texts that follow each
    other are one text.
    """
    parts = [
        piece
        for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, str))
        for piece in (["".join(run)] if is_text else run)  # type: ignore[arg-type]
    ]
    visuals = [_visual(part, vision) for part in parts if not isinstance(part, str)]
    unit = math.lcm(1, *(step.denominator for _, _, step in visuals))
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    places: list[int] = []
    end, queue = 0, iter(visuals)

    def text(ids: Sequence[int]) -> None:
        nonlocal end
        tokens.extend(ids)
        positions.append(np.repeat(end + np.arange(len(ids))[:, None] * unit, 3, axis=1))
        end += len(ids) * unit

    for part in parts:
        if isinstance(part, str):
            text(tokenizer.encode(part))
            continue
        _, grid, step = next(queue)
        text([layout.vision_start])
        count = math.prod(grid)
        places.extend(range(len(tokens), len(tokens) + count))
        tokens.extend([layout.image_pad if isinstance(part, Image) else layout.video_pad] * count)
        positions.append(end + clip_offsets(grid, step, unit))
        end += clip_extent(grid, step, unit)
        text([layout.vision_end])
    if not tokens:
        raise UserError("an empty prompt: give at least one part")
    return ChatPrompt(
        np.asarray(tokens, np.int32),
        np.concatenate(positions).astype(np.int32),
        unit,
        tuple(frames for frames, _, _ in visuals),
        np.asarray(places, np.int32),
        end,
    )
