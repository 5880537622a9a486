"""A clip and its words as one row of tokens, labels and positions, in one of two layouts.

`published` is what StreamingVLM was trained on, `streaming` what the engine puts into its cache (`streaming.prompt`):

                          published                             streaming
    previous text         first and last tokens of the block    first and last of its words
    between time and clip nothing in the first turn, else a     nothing
                          space; then the question              the question
    first clip's query    left out                              after the clip
    assistant's turn      answer \\n words " ...", encoded       [answer \\n] words " ...", encoded
                          together with the head's newline      behind the head
    the last turn         ends with a newline                   ends with <|im_end|>

Words are said in the first turn that ends no sooner than they do. With `window`, rows of the `streaming` layout say as well what the
engine has evicted by the time that each token is run (`data.eviction`). Where the model's clips are stamped (Qwen3-VL), every pair of frames is
a visual of its own behind its time, as the engine has it; nothing published has that, so that they take the `streaming` layout alone.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from svlm_jax.config import VisionConfig
from svlm_jax.data.annotations import Annotation, UnusableRow
from svlm_jax.data.batch import IGNORED
from svlm_jax.data.eviction import Eviction, Round, evictions
from svlm_jax.errors import UserError
from svlm_jax.model.rope import clip_extent, clip_offsets
from svlm_jax.streaming.prompt import PromptLayout, encode_query, encode_stamp, encode_time, encode_words, stamp_times, time_text
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Int

Layout = Literal["published", "streaming"]
SLACK = 1e-6  # of a frame: clips whose length is not exact in binary still have all their frames


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How clips become rows. The windows of the previous text are in tokens; both None: it is never cut."""

    layout: Layout = "published"
    fps: float = 2.0  # frames a second; a turn shows its whole part, so that it lasts a second where fps is a whole number
    text_sink: int | None = 512
    text_sliding: int | None = 512
    window: int | None = None  # rounds that a token sees as a stream does (vision and text window); None: all that is before it

    def __post_init__(self):
        if self.layout not in ("published", "streaming"):
            raise UserError(f"layout {self.layout!r} is unknown: published or streaming")
        if not (math.isfinite(self.fps) and self.fps >= 1):
            raise UserError(f"fps must be at least 1 (a turn shows the frames of a second), not {self.fps}")
        if (self.text_sink is None) != (self.text_sliding is None):
            raise UserError("text_sink and text_sliding must be given both or be off both")
        if self.text_sink is not None and self.text_sliding is not None:
            least = 0 if self.layout == "published" else 1
            if self.text_sink < 0 or self.text_sliding < least:
                raise UserError(f"text_sink must be at least 0 and text_sliding at least {least}, not {self.text_sink} and {self.text_sliding}")

        if self.window is not None and (self.window < 2 or self.layout == "published" or self.text_sink is None):
            asked = f"layout {self.layout}, text_sink {self.text_sink} and window {self.window}"
            raise UserError(f"{asked}: a window is of 2 rounds or more, in the layout streaming, with text_sink and text_sliding")

    @property
    def frames_per_turn(self) -> int:
        return int(self.fps)

    @property
    def turn_seconds(self) -> float:
        return self.frames_per_turn / self.fps


@dataclasses.dataclass(frozen=True)
class Turn:
    """One interval of a clip and what is said at its end."""

    start: float  # seconds of the video
    end: float
    frames: int  # that it shows; the clip's last turn may have fewer than the others
    question: str
    answer: str
    words: str  # each with a space before it; empty for silence


@dataclasses.dataclass(frozen=True)
class Script:
    """A clip's turns, and what of its annotation no turn says."""

    turns: tuple[Turn, ...]
    words_left: int  # words that end after the last turn
    questions_left: int  # questions that are asked in no turn, or that wait behind such a one


@dataclasses.dataclass(frozen=True)
class Sample:
    """One clip as a row of n tokens, C of them vision pads."""

    tokens: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]  # a token's own id where it is to be predicted, else IGNORED
    positions: Int[np.ndarray, "n 3"]  # (time, row, column) in units of 1/unit
    unit: int
    places: Int[np.ndarray, "C"]  # rows of the vision pads, in the order (grid, row, column)
    grids: tuple[tuple[int, int, int], ...]  # of each turn's clip: temporal grids, rows, columns, in merged patches
    eviction: Eviction | None = None  # with `window`


def make_script(annotation: Annotation, config: SampleConfig) -> Script:
    """Who says what when. Raises UnusableRow for a clip shorter than a frame.

    A turn takes the words, in their order, up to the first that ends after it; and the next question if it is asked after the turn's
    start and no later than its end. A question that no turn covers is never asked, nor are those behind it (as published).
    """
    count = math.floor((annotation.end - annotation.start) * config.fps + SLACK)
    if count < 1:
        raise UnusableRow("too short", f"{annotation.end - annotation.start:g} s are less than a frame at {config.fps:g} fps")
    turns, words, questions = [], list(annotation.words), list(annotation.questions)
    next_word = next_question = 0
    for first in range(0, count, config.frames_per_turn):
        start = annotation.start + first / config.fps
        end = annotation.start + (first + config.frames_per_turn) / config.fps
        spoken = []
        while next_word < len(words) and words[next_word].end <= end:
            spoken.append(" " + words[next_word].text.strip())
            next_word += 1
        question = answer = ""
        if next_question < len(questions) and start < questions[next_question].asked <= end:
            question, answer = questions[next_question].question, questions[next_question].answer
            next_question += 1
        turns.append(Turn(start, end, min(config.frames_per_turn, count - first), question, answer, "".join(spoken)))
    return Script(tuple(turns), len(words) - next_word, len(questions) - next_question)


@functools.lru_cache(64)
def _clip(grid: tuple[int, int, int], step: Fraction, unit: int) -> tuple[Int[np.ndarray, "n 3"], int]:
    """Positions of a clip's tokens from its first on, and how many it takes. The same for most turns of most samples."""
    return clip_offsets(grid, step, unit), clip_extent(grid, step, unit)


class _Row:
    """Tokens, positions and places, as pieces are put behind one another."""

    def __init__(self, step: Fraction):
        self.step, self.unit = step, step.denominator
        self.tokens: list[int] = []
        self.places: list[int] = []
        self._positions: list[np.ndarray] = [np.zeros((0, 3), np.int32)]
        self._end = 0  # first free position, in units

    def text(self, *pieces: Sequence[int]) -> None:
        for ids in pieces:
            self.tokens.extend(ids)
            self._positions.append(np.repeat(self._end + np.arange(len(ids))[:, None] * self.unit, 3, axis=1))
            self._end += len(ids) * self.unit

    def visual(self, grid: tuple[int, int, int], layout: PromptLayout) -> None:
        self.text([layout.vision_start])
        count = math.prod(grid)
        self.places.extend(range(len(self.tokens), len(self.tokens) + count))
        self.tokens.extend([layout.video_pad] * count)
        offsets, extent = _clip(grid, self.step, self.unit)
        self._positions.append(self._end + offsets)
        self._end += extent
        self.text([layout.vision_end])

    def positions(self) -> np.ndarray:
        return np.concatenate(self._positions).astype(np.int32)


def temporal_step(vision: VisionConfig, fps: float) -> Fraction:
    """Positions between two temporal grids, as the engine has it (`StreamConfig.temporal_step`)."""
    if not vision.tokens_per_second:
        return Fraction(1)
    pair = Fraction(vision.tokens_per_second) * vision.temporal_patch_size
    return (pair / Fraction(fps).limit_denominator(1000)).limit_denominator(1 << 12)


def lay_out(
    annotation: Annotation, config: SampleConfig, frame_hw: tuple[int, int], tokenizer: Tokenizer, layout: PromptLayout, vision: VisionConfig
) -> Sample:
    """The row of one clip whose frames have `frame_hw` (height, width) pixels. Opens no video.

    Raises UserError where a side is no multiple of a merged patch or the layout is not for such a model, UnusableRow as `make_script` does.
    """
    side = vision.merged_patch_size
    if vision.stamped and config.layout == "published":
        raise UserError("the layout 'published' is for models whose clips are not stamped: take layout = streaming for Qwen3-VL")
    if min(frame_hw) < side or frame_hw[0] % side or frame_hw[1] % side:
        raise UserError(f"frames of {frame_hw[0]}x{frame_hw[1]} pixels: both sides must be multiples of {side}")
    size = frame_hw[0] // side, frame_hw[1] // side
    turns = make_script(annotation, config).turns
    row = _Row(temporal_step(vision, config.fps))
    depth = vision.temporal_patch_size
    shown = [turn.frames if config.layout == "published" else config.frames_per_turn for turn in turns]  # the engine's clips are all of a size
    grids = tuple((-(-frames // depth), *size) for frames in shown)
    eviction = None
    if config.layout == "published":
        labels = _published(row, annotation, turns, grids, config, tokenizer, layout)
    else:
        labels, eviction = _streaming(row, annotation, turns, grids, config, tokenizer, layout, stamped=vision.stamped)
    return Sample(np.asarray(row.tokens, np.int32), labels, row.positions(), row.unit, np.asarray(row.places, np.int32), grids, eviction)


def _published(row: _Row, annotation, turns, grids, config: SampleConfig, tokenizer: Tokenizer, p: PromptLayout) -> np.ndarray:
    """Fills the row; gives its labels. Every block is encoded whole, as a chat template's text is: pieces may merge at their seams."""
    previous = [p.im_start, *tokenizer.encode_plain("previous text\n" + annotation.previous), *p.block_close]
    sink, sliding = config.text_sink or 0, config.text_sliding or 0
    if (sink or sliding) and len(previous) > sink + sliding:  # of the whole block, its head and closing included
        previous = previous[:sink] + previous[len(previous) - sliding :]
    row.text(p.system, previous)
    for index, (turn, grid) in enumerate(zip(turns, grids, strict=True)):
        heading = time_text(turn.start, turn.end) + (" " if index else "") + turn.question
        row.text([p.im_start], tokenizer.encode_plain("user\n" + heading))
        row.visual(grid, p)
        said = tokenizer.encode_plain(f"assistant\n{turn.answer}\n{turn.words} ...")
        row.text(p.block_close, [p.im_start], said, p.block_close)
    tokens = np.asarray(row.tokens, np.int32)
    labels = np.full(len(tokens), IGNORED, np.int32)
    # The n-th start belongs to the n-th end, also where so little of the previous text was kept that one of its own is lost (as published)
    starts, ends = np.flatnonzero(tokens == p.im_start), np.flatnonzero(tokens == p.im_end)
    for start, end in zip(starts, ends, strict=False):
        if tokens[start + 1] == p.assistant_head[1]:
            labels[start + 3 : end + 1] = tokens[start + 3 : end + 1]
    return labels


def _streaming(
    row: _Row, annotation, turns, grids, config: SampleConfig, tokenizer: Tokenizer, p: PromptLayout, *, stamped: bool
) -> tuple[np.ndarray, Eviction | None]:
    """Fills the row; gives its labels, and what is evicted."""
    turn_ids = [tokenizer.encode_plain((turn.answer + "\n" if turn.answer else "") + turn.words + " ...") for turn in turns]
    joining = 0 if config.window is None else sum(len(ids) - 1 for ids in turn_ids[: max(0, len(turns) - config.window)])
    # What would leave the previous text while the row lasts is not there from its beginning
    sliding = config.text_sliding and max(1, config.text_sliding - joining)
    words = cut_words(encode_words(tokenizer, annotation.previous), config.text_sink, sliding)
    row.text(p.system, p.previous_text_head, words, p.block_close)
    header, rounds, said = len(row.tokens), [], []
    for index, (turn, grid, ids) in enumerate(zip(turns, grids, turn_ids, strict=True)):
        start = len(row.tokens)
        row.text(p.user_head, encode_time(tokenizer, turn.start, turn.end), encode_query(tokenizer, turn.question))
        if stamped:
            for seconds in stamp_times(turn.start, config.frames_per_turn, config.fps):
                row.text(encode_stamp(tokenizer, seconds))
                row.visual((1, *grid[1:]), p)
        else:
            row.visual(grid, p)
        row.text(() if index else encode_query(tokenizer, annotation.query), p.block_close, p.assistant_head)
        begin = len(row.tokens)
        row.text(ids, [p.im_end])
        said.append(slice(begin, len(row.tokens)))
        if index < len(turns) - 1:
            row.text([p.newline])
        rounds.append(Round(start, len(row.tokens), range(begin, begin + len(ids) - 1)))
    tokens = np.asarray(row.tokens, np.int32)
    labels = np.full(len(tokens), IGNORED, np.int32)
    for part in said:
        labels[part] = tokens[part]
    if config.window is None or config.text_sink is None or config.text_sliding is None:
        return labels, None
    room = config.text_sink + config.text_sliding - 1 - len(words)
    return labels, evictions(config.window, header, rounds, row.positions(), row.unit, room)


def cut_words(words: Sequence[int], sink: int | None, sliding: int | None) -> list[int]:
    """The first `sink` and the last `sliding` - 1 words, which are what the engine keeps; all where both are None."""
    words = list(words)
    if sink is None or sliding is None or len(words) <= sink + sliding - 1:
        return words
    return words[:sink] + words[len(words) - sliding + 1 :]
