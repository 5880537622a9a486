"""The size that frames are given before the vision tower, and the resizing itself."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from svlm_jax.errors import UserError

FACTOR = 28  # pixels a side of one decoder token: a patch of 14, merged 2 x 2 (Qwen2.5-VL)
MIN_PIXELS = 100 * FACTOR**2  # StreamingVLM's VIDEO_MIN_PIXELS
MAX_PIXELS = 768 * FACTOR**2  # qwen-vl-utils' VIDEO_MAX_PIXELS = 602,112
MAX_ASPECT = 200  # long side / short side (Qwen2-VL)
MAX_SIDE = 16_384  # pixels; beyond it a header is more likely broken than true (HEVC's largest picture is about as wide)


def check_size(source: str, height: int, width: int) -> None:
    """Raises UserError, naming the source, where frames of this size (pixels) cannot be shown to the model."""
    frames = f"{source}: frames of {width} x {height} pixels"
    if min(height, width) < FACTOR or max(height, width) > MAX_SIDE:
        raise UserError(f"{frames} cannot be used: each side must be {FACTOR} to {MAX_SIDE} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"{frames} are too narrow: the sides may differ {MAX_ASPECT}-fold at most, so crop it")


def resized_size(
    height: int, width: int, *, factor: int = FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width in pixels, multiples of `factor`, near the given aspect and within the pixel limits.

    Qwen2-VL's "smart resize": each side is rounded to the nearest multiple (Python's round, so ties go to the even one); where the area
    then breaks a limit, both sides are scaled from the original size, with floor on the way down and ceil on the way up. 720 x 1280 gives
    560 x 1008. On the way up `max_pixels` is not looked at again, as in the original.

    Raises UserError where a side is not positive, the aspect is beyond 200, or the limits cannot hold.
    """
    frame = f"a frame of {width} x {height} pixels"
    if height < 1 or width < 1:
        raise UserError(f"{frame} cannot be resized: both sides must be at least 1")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"{frame} is too narrow: the sides may differ {MAX_ASPECT}-fold at most, so crop it first")
    if max_pixels < factor**2:
        raise UserError(f"max_pixels {max_pixels} is below one token of {factor} x {factor} pixels: give at least {factor**2}")
    if min_pixels > max_pixels:
        raise UserError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}")
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def resize(frame: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The frame at `size` (height, width) in pixels: bicubic, antialiased when shrinking (Pillow widens the kernel), clipped to 0..255."""
    height, width = size
    if frame.shape[:2] == (height, width):
        return np.ascontiguousarray(frame)
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BICUBIC))
