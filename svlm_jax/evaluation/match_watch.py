"""A model that comments on several matches at once: one stream each, all in one batch."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from svlm_jax.checkpoints.load import LoadedModel
from svlm_jax.config import StreamConfig
from svlm_jax.data.video import Round as VideoRound
from svlm_jax.data.video import read_ahead, read_rounds
from svlm_jax.errors import UserError
from svlm_jax.evaluation.match import Said
from svlm_jax.evaluation.watching import frame_size
from svlm_jax.programs import check_memory
from svlm_jax.streaming.engine import Engine, Round, make_spec
from svlm_jax.streaming.placed import check_streams, mesh_of
from svlm_jax.streaming.prompt import encode_query

Questions = Mapping[int, str]  # by the round they are asked in
Sent = tuple[Round, list[VideoRound]]


@dataclasses.dataclass(frozen=True)
class Watched:
    """What was said about each match, and how long each round took."""

    said: list[list[Said]]
    round_seconds: list[float]  # the first two, which compile, are left out


def watch(
    model: LoadedModel,
    films: Sequence[Path],
    questions: Sequence[Questions],
    config: StreamConfig,
    *,
    rounds: int,
    told: Callable[[float, float], None] = lambda done, total: None,
) -> Watched:
    """The first `rounds` rounds of every film. The next round's frames are read while the device works.

    Args:
      told: hears after each round the seconds of video that are done, and how many there are.

    Raises:
      UserError: where the films' sizes differ, one is too short, or the streams do not fit into memory.
    """
    config = _fit(config, model, questions, rounds)
    sizes = {frame_size(str(film), config.max_pixels, model.config.vision.merged_patch_size) for film in films}
    if len(sizes) != 1:
        raise UserError(f"films of one size make a batch, and these have {', '.join(f'{w}x{h}' for h, w in sorted(sizes))}: watch them one by one")
    size = sizes.pop()
    spec = make_spec(model.config, config, model.tokenizer, height=size[0], width=size[1])
    mesh = mesh_of(model.params)
    check_streams(mesh, len(films))
    check_memory(spec, 0, jax.tree.leaves(model.params)[0].dtype, streams=len(films), mesh=mesh)
    engine = Engine(model.params, spec, model.tokenizer, streams=len(films))
    for row in range(len(films)):
        engine.open(row, seed=config.seed + row)

    said: list[list[Said]] = [[] for _ in films]
    stamps: list[float] = []

    def finish(sent: Round, videos: list[VideoRound]) -> None:
        tokens = sent.tokens()
        engine.note(tokens)
        for row, video in enumerate(videos):
            said[row].append(Said(video.index, engine.spoken(tokens[row]), questions[row].get(video.index, "")))
        stamps.append(time.perf_counter())
        told(videos[0].end, rounds * config.chunk_seconds)

    eager = config.mode == "windows" or config.text_sink is None  # the engine must hear what a round said before the next one
    waiting: Sent | None = None
    with contextlib.ExitStack() as readers:
        for videos in _side_by_side(films, config, size, rounds, readers):
            frames = np.stack([video.frames.transpose(0, 3, 1, 2) for video in videos])
            asked = {row: each[videos[row].index] for row, each in enumerate(questions) if videos[row].index in each}
            sent = engine.step(frames, {row: (video.start, video.end) for row, video in enumerate(videos)}, asked or None)
            if waiting is not None:
                finish(*waiting)
            waiting = sent, videos
            if eager:
                finish(*waiting)
                waiting = None
        if waiting is not None:
            finish(*waiting)
    return Watched(said, np.diff(stamps[1:]).tolist())


def _fit(config: StreamConfig, model: LoadedModel, questions: Sequence[Questions], rounds: int) -> StreamConfig:
    """With room for the longest question, and in mode "full" for the whole match."""
    asked = max((len(encode_query(model.tokenizer, text)) for each in questions for text in each.values()), default=0)
    full = {"capacity_rounds": rounds + 1} if config.mode == "full" else {}
    return dataclasses.replace(config, question_capacity=asked, **full)


def _side_by_side(
    films: Sequence[Path], config: StreamConfig, size: tuple[int, int], rounds: int, readers: contextlib.ExitStack
) -> Iterator[list[VideoRound]]:
    """Round after round, of all films. UserError where one ends before the last."""
    opened = []
    for film in films:
        lasts = rounds * config.chunk_seconds
        opened.append(read_ahead(read_rounds(str(film), fps=config.fps, chunk_seconds=config.chunk_seconds, duration=lasts, size=size)))
        readers.callback(opened[-1].close)  # type: ignore[attr-defined]
    for index in range(math.ceil(rounds)):
        videos = [next(each, None) for each in opened]
        for film, video in zip(films, videos, strict=True):
            if video is None:
                raise UserError(f"{film} ends after {index * config.chunk_seconds:g} s, and {rounds * config.chunk_seconds:g} s are to be watched")
        yield [video for video in videos if video is not None]
