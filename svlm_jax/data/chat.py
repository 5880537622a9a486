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
from svlm_jax.streaming.prompt import PromptLayout, stamp_text, stamp_times
from svlm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Image:
    """A still picture, already at the model's size."""

    frame: np.ndarray  # uint8 [3, height, width], both sides multiples of `VisionConfig.merged_patch_size`


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


@dataclasses.dataclass(frozen=True)
class _Visual:
    """What stands between one `<|vision_start|>` and its `<|vision_end|>`: an image, a clip, or a stamped clip's pair of frames."""

    pad: int
    grid: tuple[int, int, int]  # temporal grids, rows and columns, in merged patches
    step: Fraction  # positions between temporal grids


def _visual(part: Image | Clip, layout: PromptLayout, vision: VisionConfig) -> tuple[np.ndarray, _Visual]:
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
    grid = (-(-len(frames) // vision.temporal_patch_size), height // side, width // side)
    return frames, _Visual(layout.image_pad if isinstance(part, Image) else layout.video_pad, grid, step)


def _pieces(part: Part, layout: PromptLayout, vision: VisionConfig) -> list[str | _Visual]:
    """A part as text and visuals."""
    if isinstance(part, str):
        return [part]
    frames, visual = _visual(part, layout, vision)
    if isinstance(part, Image) or not vision.stamped:
        return [visual]
    one = dataclasses.replace(visual, grid=(1, *visual.grid[1:]))
    return [piece for seconds in stamp_times(0.0, len(frames), part.fps) for piece in (stamp_text(seconds), one)]


def lay_out(parts: Sequence[Part], tokenizer: Tokenizer, layout: PromptLayout, vision: VisionConfig) -> ChatPrompt:
    """The prompt's tokens and positions: text counts on, a visual spans (time, row, column) from its base.

    Text is encoded with its special tokens (`<|im_start|>` and so on), as chat templates write them; texts that follow each
    other are one text, stamps included.
    """
    pieces = [
        piece
        for is_text, run in itertools.groupby((p for part in parts for p in _pieces(part, layout, vision)), lambda p: isinstance(p, str))
        for piece in (["".join(run)] if is_text else run)  # type: ignore[arg-type]
    ]
    unit = math.lcm(1, *(piece.step.denominator for piece in pieces if isinstance(piece, _Visual)))
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    places: list[int] = []
    end = 0

    def text(ids: Sequence[int]) -> None:
        nonlocal end
        tokens.extend(ids)
        positions.append(np.repeat(end + np.arange(len(ids))[:, None] * unit, 3, axis=1))
        end += len(ids) * unit

    for piece in pieces:
        if isinstance(piece, str):
            text(tokenizer.encode(piece))
            continue
        text([layout.vision_start])
        count = math.prod(piece.grid)
        places.extend(range(len(tokens), len(tokens) + count))
        tokens.extend([piece.pad] * count)
        positions.append(end + clip_offsets(piece.grid, piece.step, unit))
        end += clip_extent(piece.grid, piece.step, unit)
        text([layout.vision_end])
    if not tokens:
        raise UserError("an empty prompt: give at least one part")
    return ChatPrompt(
        np.asarray(tokens, np.int32),
        np.concatenate(positions).astype(np.int32),
        unit,
        tuple(_visual(part, layout, vision)[0] for part in parts if not isinstance(part, str)),
        np.asarray(places, np.int32),
        end,
    )
