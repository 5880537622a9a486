"""Answers to questions about videos and pictures, as benchmarks of question answering put them: in one chat, or in mid-stream.

A message is `{"role": ..., "content": [{"type": "text", "text"}, {"type": "video", "url", "start_time", "end_time"}, {"type": "image", "url"}]}`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pictures

from svlm_jax.api import Commentary
from svlm_jax.checkpoints.load import LoadedModel
from svlm_jax.data.chat import Clip, Image, Part
from svlm_jax.data.resize import MAX_PIXELS, MIN_PIXELS, resize, resized_size
from svlm_jax.data.video import probe, read_rounds
from svlm_jax.errors import UserError
from svlm_jax.generate import generate

BUDGET = 128  # tokens of an offline answer, unless the benchmark says


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """How videos are shown."""

    way: str = "offline"  # or "streaming"
    fps: float = 2.0
    max_frames: int = 64  # of an offline video: a longer one is shown at a lower rate
    max_pixels: int = MAX_PIXELS  # of a frame
    max_new_tokens: int = 20  # a round, in a stream

    def __post_init__(self) -> None:
        if self.way not in ("offline", "streaming"):
            raise UserError(f"way {self.way!r} is unknown: offline or streaming")
        if self.max_frames < 1 or self.max_new_tokens < 1 or not self.fps > 0:
            raise UserError("fps, max_frames and max_new_tokens must be above 0")


@dataclasses.dataclass(frozen=True)
class Video:
    """A stretch of a video, in seconds; None is its beginning or end."""

    source: str
    start: float | None = None
    end: float | None = None

    def span(self) -> tuple[float, float]:
        """Where it begins and ends. UserError where nobody knows."""
        start = self.start or 0.0
        end = probe(self.source).duration if self.end is None else self.end
        if end is None or not start < end:
            raise UserError(f"{self.source}: from {start:g} s there is nothing to be shown: check the video and its times")
        return start, end


def answer(model: LoadedModel, messages: Sequence[Mapping[str, Any]], config: AnswerConfig, **sampling: Any) -> str:
    """The model's answer, greedy unless `sampling` says otherwise (temperature, top_p, top_k, seed; max_new_tokens offline).

    Raises UserError for what cannot be shown.
    """
    if config.way == "streaming":
        return _in_stream(model, messages, config, **{key: value for key, value in sampling.items() if key != "max_new_tokens"})
    return _offline(model, messages, config, **sampling)


def cut(text: str, until: str | Iterable[str] | None) -> str:
    """Without what begins at the first of the stops."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def _offline(model: LoadedModel, messages: Sequence[Mapping[str, Any]], config: AnswerConfig, **sampling: Any) -> str:
    """All frames and texts as one chat, in Qwen2.5-VL's template."""
    chat = [{"role": message["role"], "content": [_part(model, part, config) for part in _parts(message)]} for message in messages]
    return generate(model, chat, **{"max_new_tokens": BUDGET, "temperature": 0.0} | sampling).text


def _in_stream(model: LoadedModel, messages: Sequence[Mapping[str, Any]], config: AnswerConfig, **sampling: Any) -> str:
    """The video is watched round by round, at constant memory, and asked about at its end, in its last whole round.

    The answer is what is said in that round, or after it where that is nothing.
    """
    parts = [part for message in messages if message["role"] != "system" for part in _parts(message)]
    videos = [_video(part) for part in parts if part["type"] == "video"]
    if len(videos) != 1 or any(part["type"] == "image" for part in parts):
        raise UserError(f"a stream is asked about one video and no pictures, not {len(videos)} videos: use way=offline")
    question = "\n".join(part["text"] for part in parts if part["type"] == "text").strip()
    start, end = videos[0].span()
    asked = max(start, math.floor(end - start - 1e-6) - 1 + start)
    settings: dict[str, Any] = {"query": "", "temperature": 0.0, "repetition_penalty": 1.0} | sampling
    stream = Commentary(
        videos[0].source,
        model,
        start=start,
        duration=end - start,
        questions=[(asked, question)],
        fps=config.fps,
        max_pixels=config.max_pixels,
        max_new_tokens=config.max_new_tokens,
        **settings,
    )
    said = [each.caption.text for each in stream if each.caption.end > asked]
    return next((text for text in said if text), "")


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
    for part in parts:
        if part.get("type") not in ("text", "image", "video"):
            raise UserError(f"a message has {part.get('type')!r}, which the model cannot take: texts, images and videos")
    return parts


def _video(part: Mapping[str, Any]) -> Video:
    return Video(str(part["url"]), part.get("start_time"), part.get("end_time"))


def _part(model: LoadedModel, part: Mapping[str, Any], config: AnswerConfig) -> Part:
    """As `generate` takes it."""
    if part["type"] == "text":
        return part["text"]
    if part["type"] == "image":
        picture = part["url"] if isinstance(part["url"], Pictures.Image) else Pictures.open(part["url"])
        pixels = np.asarray(picture.convert("RGB"))
        factor = model.config.vision.merged_patch_size
        size = resized_size(*pixels.shape[:2], factor=factor, min_pixels=min(MIN_PIXELS, config.max_pixels), max_pixels=config.max_pixels)
        return Image(np.ascontiguousarray(resize(pixels, size).transpose(2, 0, 1)))
    video = _video(part)
    start, end = video.span()
    rate = min(config.fps, config.max_frames / (end - start))
    rounds = read_rounds(video.source, fps=rate, chunk_seconds=1 / rate, max_pixels=config.max_pixels, start=start, duration=end - start)
    frames = [each.frames[0].transpose(2, 0, 1) for each in rounds][: config.max_frames]
    return Clip(np.ascontiguousarray(np.stack(frames)), fps=rate)
