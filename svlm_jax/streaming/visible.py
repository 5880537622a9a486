"""Reading a stream's sequence back from its slots: what the model sees, in order, and where. Host side, for checks and tools."""

import dataclasses

import numpy as np

from svlm_jax.streaming.layout import Field
from svlm_jax.streaming.state import StreamState


@dataclasses.dataclass(frozen=True)
class Visible:
    """One stream's visible tokens in the order of the sequence."""

    tokens: np.ndarray  # int32 [n]
    positions: np.ndarray  # float64 [3, n]
    slots: np.ndarray  # int32 [n]


def visible(state: StreamState, row: int = 0) -> Visible:
    """The sequence of one stream, rebuilt from region, field and coordinate: order in memory means nothing."""
    spec, roles = state.spec, state.spec.cache.describe()
    slots = np.flatnonzero(np.asarray(state.valid)[row])
    shift = np.asarray(state.shift, np.int64)[row]
    positions = np.asarray(state.coordinates)[row][:, slots].astype(np.int64) - shift[roles.region[slots]]
    # The previous text stands before the rounds; its closing tokens behind its words, whatever their positions ("append")
    rank = {Field.HEADER: 0, Field.SINK_WORD: 1, Field.SPILL: 2, Field.RING_WORD: 3, Field.CLOSING: 4}
    part = np.array([rank.get(Field(field), 5) for field in roles.field[slots]])
    order = np.lexsort((positions[2], positions[1], positions[0], part))
    return Visible(np.asarray(state.tokens)[row][slots][order], positions[:, order] / spec.unit, slots[order])
