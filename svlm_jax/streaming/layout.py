"""Where things stand in the cache: regions, rooms and fields, all static.

A region is a tile-aligned range of slots with one shift of positions. A room is one round's place in a ring of rooms;
a field is a run of slots in it. Order in memory means nothing to attention, so a field is placed for cheap writes:

    SINK    [system prompt, previous-text head | first words | closing tokens | spill]
    WORDS   ring of the last text_sliding - 1 words
    TEXT    (text window longer)    rooms [pending, user head, time | closing, assistant head, generated], questions, query
    CLIPS   (vision window longer)  rooms [user head | clip, closing], query
    ROUNDS  rooms [hole | pending, user head, time | clip | closing, assistant head | generated], questions, query

The spill holds the middle of an initial text that is longer than sink and ring; it is seen in the first round only.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.model.rope import Rotation, clip_extent, clip_offsets, mrope_rotation
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.types import Array, Int

TILE = 128  # regions start on a tile
CACHE_TILE = 1024  # the whole cache is a multiple of this: split products over slots would else copy the values to pad them
ROW_TILE = 16  # chunks and rooms are multiples of this (the bf16 tile of a TPU)
PENDING_SLOTS = 3  # last sampled token, <|im_end|> if the turn was cut, newline


class Field(enum.IntEnum):
    """What a slot is for."""

    NONE = 0
    HEADER = 1  # system prompt and previous-text head
    SINK_WORD = 2
    CLOSING = 3  # <|im_end|>\n of the previous text
    SPILL = 4
    RING_WORD = 5
    PENDING = 6  # what the previous turn left unrun
    HEAD = 7
    TIME = 8
    QUESTION = 9
    CLIP = 10  # vision_start to vision_end, or from the first stamp to the last vision_end
    QUERY = 11  # the first round's
    CLOSE = 12
    ASSISTANT = 13
    GENERATED = 14


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Ring:
    """One region's rooms. Questions stand apart from the rooms, so that their tiles are skipped while nobody asks."""

    region: int
    start: int  # first slot of the region
    rooms: int
    horizon: int  # a round leaves this ring when it is so many rounds old
    fields: tuple[tuple[Field, int], ...]  # (field, slots) in a room, NONE for holes
    question: int  # slots of a room's question
    query: int  # slots of the query, one span a region

    @functools.cached_property
    def room_fields(self) -> np.ndarray:
        """int8 [stride]: the field of each slot of a room."""
        fields = np.zeros(self.stride, np.int8)
        sizes = [size for _, size in self.fields]
        fields[: sum(sizes)] = np.repeat([field for field, _ in self.fields], sizes)
        return fields

    @functools.cached_property
    def stride(self) -> int:
        return round_up(sum(size for _, size in self.fields), ROW_TILE)

    @functools.cached_property
    def stop(self) -> int:
        return self.start + round_up(self.rooms * (self.stride + self.question) + self.query, TILE)

    def room(self, round):
        """The room of a round (a number or traced), counted by the engine: the same for every stream."""
        return round % self.rooms

    def size(self, *fields: Field) -> int:
        """Slots of a run of fields."""
        apart = {Field.QUESTION: self.question, Field.QUERY: self.query}
        return sum(size for field, size in (*self.fields, *apart.items()) if field in fields)

    def slot(self, field: Field, room):
        """First slot of `field` in `room` (a number or a traced int32)."""
        if field is Field.QUESTION:
            return self.start + self.rooms * self.stride + room * self.question
        if field is Field.QUERY:
            return self.start + self.rooms * (self.stride + self.question)
        offset = 0
        for other, size in self.fields:
            if other is field:
                return self.start + room * self.stride + offset
            offset += size
        raise KeyError(f"{field.name} has no place in region {self.region}")

    def describe(self, field_of: np.ndarray, room_of: np.ndarray) -> None:
        """Writes each slot's field and room into the two arrays [S]."""
        for room in range(self.rooms):
            at = self.start + room * self.stride
            room_of[at : at + self.stride], field_of[at : at + self.stride] = room, self.room_fields
            at = self.slot(Field.QUESTION, room)
            field_of[at : at + self.question], room_of[at : at + self.question] = Field.QUESTION, room
        at = self.slot(Field.QUERY, 0)
        field_of[at : at + self.query] = Field.QUERY


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """All that is static about an engine: its programs are compiled for this, and every stream in a batch shares it."""

    model: ModelConfig
    stream: StreamConfig
    prompt: PromptLayout
    height: int  # pixels of a frame, after resizing
    width: int
    time_capacity: int  # tokens of the longest time text
    query_capacity: int = 64  # tokens of the longest first-round query
    stamp_capacity: int = 0  # tokens of the longest stamp, where the model's clips are stamped
    initial_words: int = 0  # tokens of the longest initial previous text (sink and ring always fit)
    watch: tuple[int, ...] = ()  # token ids whose raw logits every step records

    def __post_init__(self):
        side = self.model.vision.merged_patch_size
        if self.height % side or self.width % side or min(self.height, self.width) < side:
            raise UserError(f"frames of {self.height}x{self.width} pixels: both sides must be multiples of {side}")

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        """Of a round's clip, in merged patches: (temporal grids, rows, columns)."""
        side = self.model.vision.merged_patch_size
        return self.stream.grids_per_round, self.height // side, self.width // side

    @functools.cached_property
    def temporal_step(self) -> Fraction:
        return self.stream.temporal_step(self.model.vision.tokens_per_second)

    @property
    def unit(self) -> int:
        """Coordinates of one position: the denominator of the temporal step."""
        return self.temporal_step.denominator

    @functools.cached_property
    def visual_grid(self) -> tuple[int, int, int]:
        """Of one visual in a clip: a clip is one, or, where clips are stamped, as many as it has temporal grids."""
        t, h, w = self.grid
        return (1, h, w) if self.model.vision.stamped else (t, h, w)

    @functools.cached_property
    def visuals(self) -> tuple[tuple[int, int], ...]:
        """(first, stop) row of every visual's pads, counted from the clip's first row."""
        pads = math.prod(self.visual_grid)
        stamp = self.stamp_capacity if self.model.vision.stamped else 0
        starts = (index * (stamp + pads + 2) + stamp + 1 for index in range(self.grid[0] // self.visual_grid[0]))
        return tuple((start, start + pads) for start in starts)

    @functools.cached_property
    def clip_tokens(self) -> tuple[int, ...]:
        """Of a clip's rows; 0 where a stamp stands."""
        p, ids = self.prompt, [0] * (self.visuals[-1][1] + 1)
        for first, stop in self.visuals:
            ids[first - 1 : stop + 1] = [p.vision_start, *([p.video_pad] * (stop - first)), p.vision_end]
        return tuple(ids)

    @functools.cached_property
    def clip_pads(self) -> np.ndarray:
        """bool [rows]: which of a clip's rows are pads."""
        return np.equal(self.clip_tokens, self.prompt.video_pad)

    @functools.cached_property
    def pad_offsets(self) -> np.ndarray:
        """int32 [t h w, 3] coordinates of a visual's pads after its base."""
        return clip_offsets(self.visual_grid, self.temporal_step, self.unit)

    @functools.cached_property
    def pads_extent(self) -> int:
        """Coordinates that a visual's pads take; all else in a clip takes a position a token."""
        return clip_extent(self.visual_grid, self.temporal_step, self.unit)

    def rotation(self, coordinates: Int[Array, "... 3"]) -> Rotation:
        """Of tokens at these coordinates, in units of 1/unit."""
        t = self.model.text
        return mrope_rotation(coordinates, axes=t.mrope_axes, theta=t.rope_theta, denominator=self.unit)

    @functools.cached_property
    def cache(self) -> "CacheLayout":
        return CacheLayout(self)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in dataclasses.fields(self)))

    def __hash__(self) -> int:
        return self._hash


class CacheLayout:
    """Regions, rings and the role of every slot, from a spec."""

    def __init__(self, spec: StreamSpec):
        s, p = spec.stream, spec.prompt
        if s.mode == "full":
            self.vision_window = self.text_window = s.capacity_rounds
        elif s.mode == "windows":
            self.vision_window = self.text_window = max(2, s.vision_window)
        else:
            self.vision_window, self.text_window = s.vision_window, s.text_window
        if s.mode == "full":
            self.sink, self.ring = spec.initial_words, 0
        elif s.text_sink is None or s.text_sliding is None:
            self.sink, self.ring = max(s.text_capacity, spec.initial_words), 0
        else:
            self.sink, self.ring = s.text_sink, s.text_sliding - 1
        self.spill = max(0, spec.initial_words - self.sink - self.ring)
        self.words_capacity = self.sink + self.ring + self.spill

        # SINK and WORDS
        header = len(p.system) + len(p.previous_text_head)
        self.header = header
        self.closing_slot = header + self.sink
        fixed = [(Field.HEADER, header), (Field.SINK_WORD, self.sink), (Field.CLOSING, len(p.block_close)), (Field.SPILL, self.spill)]
        sink_stop = round_up(sum(n for _, n in fixed), TILE)
        self.words_start = sink_stop
        words_stop = sink_stop + round_up(self.ring, TILE)
        regions: list[tuple[int, int]] = [(0, sink_stop)]
        if self.ring:
            regions.append((sink_stop, words_stop))
        self.words_region = 1 if self.ring else 0

        # Rings of rooms
        question, query = round_up(s.question_capacity, ROW_TILE), round_up(spec.query_capacity, ROW_TILE)
        sizes = {
            Field.PENDING: PENDING_SLOTS,
            Field.HEAD: len(p.user_head),
            Field.TIME: spec.time_capacity,
            Field.CLIP: len(spec.clip_tokens),
            Field.CLOSE: len(p.block_close),
            Field.ASSISTANT: len(p.assistant_head),
            Field.GENERATED: s.max_new_tokens - 1,
        }

        def add(rooms: int, horizon: int, fields: Sequence[Field], question: int, hole: int = 0) -> Ring:
            ring = Ring(len(regions), regions[-1][1], rooms, horizon, ((Field.NONE, hole), *((f, sizes[f]) for f in fields)), question, query)
            assert ring.start % TILE == 0 and ring.stride % ROW_TILE == 0
            regions.append((ring.start, ring.stop))
            return ring

        before, after = (Field.PENDING, Field.HEAD, Field.TIME), (Field.CLOSE, Field.ASSISTANT)
        difference = abs(self.vision_window - self.text_window)
        self.text = self.clips = None
        if self.text_window > self.vision_window:
            self.text = add(difference, self.text_window, (*before, *after, Field.GENERATED), question)
        elif self.vision_window > self.text_window:
            self.clips = add(difference, self.vision_window, (Field.HEAD, Field.CLIP, Field.CLOSE), 0)
        prompt_rows = sum(sizes[f] for f in (*before, Field.CLIP, *after))
        self.hole = -prompt_rows % ROW_TILE
        self.chunk_rows = prompt_rows + self.hole  # without question and query
        newest = min(self.vision_window, self.text_window)
        self.rounds = add(newest, newest, (*before, Field.CLIP, *after, Field.GENERATED), question, self.hole)
        self.slots = round_up(self.rounds.stop, CACHE_TILE)
        regions[-1] = (self.rounds.start, self.slots)
        self.regions = tuple(regions)

        self.fixed = tuple(fixed)
        self.spill_slot = sum(size for _, size in fixed) - self.spill

    def words_slots(self) -> tuple[slice, ...]:
        """The runs of slots that hold previous text: in the sink, behind its closing tokens, and in the ring."""
        runs = ((self.header, self.sink), (self.spill_slot, self.spill), (self.words_start, self.ring))
        return tuple(slice(start, start + size) for start, size in runs)

    def describe(self) -> "Roles":
        """What every slot is for. Made anew at every call, for checks: streaming keeps nothing of this size on the host."""
        roles = Roles(np.zeros(self.slots, np.int8), np.full(self.slots, -1, np.int32), np.zeros(self.slots, np.int32))
        for index, (start, stop) in enumerate(self.regions):
            roles.region[start:stop] = index
        at = 0
        for field, size in self.fixed:
            roles.field[at : at + size] = field
            at += size
        roles.field[self.words_start : self.words_start + self.ring] = Field.RING_WORD
        for ring in (self.text, self.clips, self.rounds):
            if ring is not None:
                ring.describe(roles.field, roles.room)
        return roles


class Roles(NamedTuple):
    """Of every slot."""

    field: np.ndarray  # int8 [S], a `Field`
    room: np.ndarray  # int32 [S], -1 outside of rooms
    region: np.ndarray  # int32 [S]
