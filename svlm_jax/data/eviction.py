"""What a stream's cache still holds when a token of a row is run: the last rounds where they stand, and words as previous text.

A row without eviction is read as any other text. With it, a row is what the engine does with the same rounds (`streaming.evict`, equal
windows): a round that grows too old leaves, its words become previous text, and keep the keys and values that they had among pictures.
As all that stays of the rounds moves left together, two frames of coordinates are enough: that of the row, in which tokens see rounds, and
that of the stream, in which they see previous text. They differ by `shift`.

    previous text   header | words of before | words that have joined since | closing tokens, which move behind the last of them
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from svlm_jax.data.annotations import UnusableRow
from svlm_jax.types import Array, Int

BLOCK = 512  # queries that attention takes at a time (`training.streamed_attention`), all of one sample
NEVER = np.iinfo(np.int32).max // 2  # the round of padding: no previous text is there for it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eviction:
    """Facts of rows; of one sample without the axis B. Arrays may be NumPy's or a device's. Rounds are numbered on through a row."""

    # Of each token
    start: Int[Array, "*B T"]  # place in the row of the first token of a round that it sees, up to itself; behind itself: it sees none
    round: Int[Array, "*B T"]  # in which it is run
    shift: Int[Array, "*B T"]  # coordinates that the rounds have moved left by then
    # Of each of M places of previous text; in a row, so many of each sample
    source: Int[Array, "*B M"]  # the token that stands there; it is not seen by tokens before it
    coordinate: Int[Array, "*B M"]  # where that is in the stream
    first: Int[Array, "*B M"]  # rounds in which it stands there: from this one
    stop: Int[Array, "*B M"]  # up to this one, which no longer counts


@dataclasses.dataclass(frozen=True)
class Round:
    """Where a round is in a row: its tokens from the user's head to the newline behind the turn, and the words of its turn."""

    start: int
    stop: int
    words: range  # without " ...<|im_end|>"


def evictions(window: int, header: int, rounds: Sequence[Round], positions: Int[np.ndarray, "n 3"], unit: int, room: int) -> Eviction:
    """The facts of one sample.

    Args:
      window: rounds that are seen, the one that is run included.
      header: tokens before the first round: system prompt and previous text, its two closing tokens last.
      positions: of the row's tokens, in units of 1/unit.
      room: words that may join the previous text before any would leave it.

    Raises:
      UnusableRow: where more words than that would join.
    """
    tokens, starts = len(positions), np.asarray([each.start for each in rounds])
    along = positions[:, 0]
    extents = np.diff([along[each.start] for each in rounds], append=0)  # the last is in no round's past
    joining = np.asarray([len(each.words) for each in rounds])
    if joining[: max(0, len(rounds) - window)].sum() > room:
        raise UnusableRow("too many words", f"{joining.sum()} words in {len(rounds)} rounds are more than the previous text has room for")

    # The closing <|im_end|> and the newline behind a turn are run in the next round, and leave with their own
    round_of = np.zeros(tokens, np.int32)
    for number, each in enumerate(rounds[1:], start=1):
        round_of[each.start - 2 : each.stop] = number
    oldest = np.maximum(round_of - window + 1, 0)
    gone = np.concatenate([[0], np.cumsum(extents - joining * unit)])
    start = starts[oldest]
    start[:header] = np.arange(1, header + 1)

    joined = np.concatenate([[0], np.cumsum(joining)])  # words of the rounds before
    end = along[header - 2]  # where the first word goes that joins
    places = [(token, along[token], 0, len(rounds)) for token in range(header - 2)]
    for number, each in enumerate(rounds[: max(0, len(rounds) - window)]):
        places += [(word, end + (joined[number] + i) * unit, number + window, len(rounds)) for i, word in enumerate(each.words)]
    begin = 0
    for number in range(1, len(rounds) + 1):
        now = joined[max(0, begin - window + 1)]
        if number == len(rounds) or joined[max(0, number - window + 1)] != now:
            places += [(header - 2 + i, end + (now + i) * unit, begin, number) for i in range(2)]
            begin = number
    memory = np.asarray(places, np.int32).reshape(-1, 4).T
    return Eviction(start.astype(np.int32), round_of, gone[oldest].astype(np.int32), *memory)
