"""What a contestant has to comment on, and what comes of it."""

import dataclasses
from typing import NamedTuple

from svlm_jax.evaluation.inf_streams import Piece


@dataclasses.dataclass(frozen=True)
class Watch:
    """One stretch of one video."""

    name: str  # of the video, in results
    video: str  # a path or URL
    start: float  # seconds
    end: float
    previous: str = ""  # all that was said before
    query: str | None = None  # None: the settings' own


class Record(NamedTuple):
    """A watch's results from `start` to `end`, for the journal."""

    watch: Watch
    start: float
    end: float
    items: list[Piece]
