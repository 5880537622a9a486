"""Overlapping chunks of long annotated videos (arXiv 2510.09608, section 3.2): W seconds each, O of them shared with the next.

A chunk from a to b has the words that end after a and no later than b; all words before it are its previous text. Words are taken
in their order: one behind a word that ends later counts as ending with it, as it does when a clip's turns are made.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator

from svlm_jax.data.annotations import Annotation
from svlm_jax.errors import UserError

TOLERANCE = 1e-6  # seconds


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How a video is cut. All in seconds."""

    window: float = 24.0
    overlap: float = 12.0
    turn: float = 1.0  # chunks are whole numbers of turns, and begin where a turn of the video does

    def __post_init__(self):
        if not (self.turn > 0 and 0 <= self.overlap < self.window and math.isfinite(self.window)):
            given = f"chunks of {self.window:g} s that share {self.overlap:g} s"
            raise UserError(f"{given}: the overlap must be shorter than the window, and neither negative")
        for name, value in (("window", self.window), ("overlap", self.overlap)):
            if abs(value / self.turn - round(value / self.turn)) > TOLERANCE:
                raise UserError(f"the {name} of {value:g} s must be a whole number of turns of {self.turn:g} s")

    @property
    def stride(self) -> float:
        return self.window - self.overlap


def chunk_times(start: float, end: float, config: ChunkConfig) -> list[tuple[float, float]]:
    """From when to when each chunk lasts, in seconds of the video: they cover start..end, each sharing `overlap` with the next.

    The last one ends with the turn in which the video ends, so that it may be shorter than the others and up to a turn longer
    than the video.
    """
    turns = math.ceil((end - start) / config.turn - TOLERANCE)
    window, stride = round(config.window / config.turn), round(config.stride / config.turn)
    firsts = range(0, max(1, turns - window + stride), stride)
    begins = ((first, start + first * config.turn) for first in firsts)
    return [(begin, begin + min(window, turns - first) * config.turn) for first, begin in begins]  # ends as a clip's turns have them


def make_chunks(annotation: Annotation, config: ChunkConfig) -> Iterator[Annotation]:
    """The chunks of one long clip. Words and questions outside of it are put to its first and last moment: none is lost."""
    times = chunk_times(annotation.start, annotation.end, config)
    final = times[-1][1]
    words = [word if word.end <= final else word._replace(start=min(word.start, final), end=final) for word in annotation.words]
    said = list(itertools.accumulate((word.end for word in words), max))
    questions = [question._replace(asked=min(max(question.asked, annotation.start + TOLERANCE), final)) for question in annotation.questions]
    last = 0
    for start, end in times:
        # No word between two chunks whose times meet but for rounding
        first = min(last, bisect.bisect_right(said, start)) if config.overlap else last
        last = bisect.bisect_right(said, end)
        previous = " ".join(filter(None, (annotation.previous, *(word.text.strip() for word in words[:first]))))
        yield dataclasses.replace(
            annotation,
            start=start,
            end=end,
            previous=previous,
            words=tuple(words[first:last]),
            questions=tuple(question for question in questions if start < question.asked <= end),
        )
