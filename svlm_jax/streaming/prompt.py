"""How a stream is put into tokens: the pieces of the sequence, and what a turn's tokens say.

    system | previous_text_head WORDS block_close | round | round | ...
    round = user_head time clip [query] block_close assistant_head turn im_end newline
    clip  = vision_start video_pad*n vision_end, of a model whose clips are stamped (Qwen3-VL) once a pair of frames, behind its stamp

Pieces are encoded one by one and joined as ids. That gives the ids of the joined text, because special tokens and the
newline before `Time` are boundaries that no merge crosses. Only a previous text that starts with blank lines differs: there the
head keeps its own newline. What users write (query, previous text, system prompt) never yields a structural token.
"""

import dataclasses
import math
from collections.abc import Sequence

from svlm_jax.errors import UserError
from svlm_jax.tokenizer import Tokenizer

SYSTEM_PROMPT = "You are a helpful assistant."  # the default of Qwen2.5-VL's chat template
LONGEST_TIME = (9_999_999.0, 10_000_000.0)  # seconds; 115 days of stream, and 23 tokens in Qwen's vocabulary


@dataclasses.dataclass(frozen=True)
class PromptLayout:
    """The token ids of all that is neither video, time, query nor words. Hashable, so it can be static under `jit`."""

    im_start: int  # <|im_start|>
    im_end: int  # <|im_end|>, which closes a turn
    vision_start: int  # <|vision_start|>
    vision_end: int  # <|vision_end|>
    video_pad: int  # <|video_pad|>, one a merged patch of video
    image_pad: int  # <|image_pad|>, one a merged patch of a still picture
    newline: int  # "\n"
    ellipsis: int  # " ...", the last word of a turn; a turn of nothing else is silence
    blanks: tuple[int, ...]  # tokens of white space alone: a turn of these says nothing either
    system: tuple[int, ...]  # <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
    previous_text_head: tuple[int, ...]  # <|im_start|>previous text\n
    block_close: tuple[int, ...]  # <|im_end|>\n
    user_head: tuple[int, ...]  # <|im_start|>user\n
    assistant_head: tuple[int, ...]  # <|im_start|>assistant\n

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, system_prompt: str = SYSTEM_PROMPT) -> "PromptLayout":
        """The layout in `tokenizer`'s ids. UserError where it lacks a special token, or splits the newline or " ..."."""
        im_start, im_end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
        newline = _single(tokenizer, "\n")

        def head(text: str) -> tuple[int, ...]:
            return (im_start, *tokenizer.encode_plain(text))

        blanks = (tokenizer.encode_plain(text) for text in ("\n", "\n\n", " ", " \n", "\n\n\n", "  "))
        return cls(
            im_start=im_start,
            im_end=im_end,
            vision_start=tokenizer.special("<|vision_start|>"),
            vision_end=tokenizer.special("<|vision_end|>"),
            video_pad=tokenizer.special("<|video_pad|>"),
            image_pad=tokenizer.special("<|image_pad|>"),
            newline=newline,
            ellipsis=_single(tokenizer, " ..."),
            blanks=tuple(dict.fromkeys(ids[0] for ids in blanks if len(ids) == 1)),
            system=(*head(f"system\n{system_prompt}"), im_end, newline),
            previous_text_head=head("previous text\n"),
            block_close=(im_end, newline),
            user_head=head("user\n"),
            assistant_head=head("assistant\n"),
        )


def _single(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode_plain(text)
    if len(ids) != 1:
        raise UserError(f"{text!r} is {len(ids)} tokens here and must be one: use the tokenizer of a Qwen-VL model")
    return ids[0]


def time_text(start: float, end: float) -> str:
    """What a round is headed with, for `start` and `end` in seconds of video: `Time=12.0-13.0s`."""
    return f"Time={start:.1f}-{end:.1f}s"


def time_capacity(tokenizer: Tokenizer) -> int:
    """Tokens that every room of the cache keeps free for its time: those of the longest one allowed."""
    return len(tokenizer.encode_plain(time_text(*LONGEST_TIME)))


def encode_time(tokenizer: Tokenizer, start: float, end: float) -> tuple[int, ...]:
    """The ids of `time_text`, at most `time_capacity` of them. UserError for times that are not 0 <= start <= end, or too long."""
    if not (0 <= start <= end and math.isfinite(end)):
        raise UserError(f"a round cannot last from {start} to {end} seconds: times must be finite, not negative and in order")
    ids = tuple(tokenizer.encode_plain(time_text(start, end)))
    if len(ids) > time_capacity(tokenizer):
        raise UserError(f"{time_text(start, end)} is too long a time: a stream ends at {LONGEST_TIME[1]:.0f} seconds; start a new one")
    return ids


def stamp_text(seconds: float) -> str:
    """What stands before a pair of frames where clips are stamped, for the mean of their times in the video: `<12.2 seconds>`."""
    return f"<{seconds:.1f} seconds>"


def stamp_times(start: float, frames: int, fps: float) -> list[float]:
    """The times of a clip's pairs of frames, the first at `start`, in seconds; an odd last frame makes a pair with itself."""
    times = [start + index / fps for index in range(frames)]
    return [(first + times[min(index + 1, frames - 1)]) / 2 for index, first in enumerate(times) if index % 2 == 0]


def stamp_capacity(tokenizer: Tokenizer) -> int:
    """Tokens that every stamp's place keeps free: those of the longest one allowed."""
    return len(tokenizer.encode_plain(stamp_text(LONGEST_TIME[1])))


def encode_stamp(tokenizer: Tokenizer, seconds: float) -> tuple[int, ...]:
    """The ids of `stamp_text`, for a time that `encode_time` has let pass."""
    return tuple(tokenizer.encode_plain(stamp_text(seconds)))


def encode_words(tokenizer: Tokenizer, previous_text: str) -> tuple[int, ...]:
    """The ids of the initial previous text, uncut; none for an empty one."""
    return tuple(tokenizer.encode_plain(previous_text))


def encode_query(tokenizer: Tokenizer, query: str) -> tuple[int, ...]:
    """The ids of the query or question, which follows `<|vision_end|>` directly; none for an empty one."""
    return tuple(tokenizer.encode_plain(query))


def spoken_ids(turn_ids: Sequence[int], layout: PromptLayout) -> list[int]:
    """The words of one generated turn: a closed turn without ` ...<|im_end|>`, a turn cut off at its budget whole."""
    ids = [int(id) for id in turn_ids]
    if ids and ids[-1] == layout.im_end:
        ids.pop()
        if ids and ids[-1] == layout.ellipsis:
            ids.pop()
    return ids


def is_silence(turn_ids: Sequence[int], layout: PromptLayout) -> bool:
    """Whether a generated turn, closed or cut, says nothing: ` ...`, white space and `<|im_end|>` are all it holds."""
    nothing = {layout.ellipsis, layout.im_end, *layout.blanks}
    return all(int(id) in nothing for id in turn_ids)
