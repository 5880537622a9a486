"""The state of a batch of streams: everything that one round leaves for the next, at fixed shapes for ever."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from svlm_jax.config import StreamConfig
from svlm_jax.kernels.ring_attention.int8 import Int8Rows, Rows
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """Donated to every step and returned by it. B streams in lock step: a room's index is the same for all of them.

    The cache stores facts: masks, orders and positions derive from them. A slot counts if and only if it is valid.
    """

    k: tuple[Rows, ...]  # [B, K, S, H], one array a layer: keys, rotated at the coordinate u they were written with
    v: tuple[Rows, ...]
    # Keys in eight bits only, else empty: those of the previous text's closing tokens, not rotated
    closing: tuple[Float[Array, "B K C H"], ...]
    # Mode "recompute" only, else empty: what each slot's token looked like, and what DeepStack adds to it, an array a layer
    embeddings: tuple[Float[Array, "B 1 S D"], ...]
    valid: Bool[Array, "B S"]
    tokens: Int[Array, "B S"]
    coordinates: Int[Array, "B 3 S"]  # u, in units of 1/unit; position p = u - shift of the slot's region
    shift: Int[Array, "B R"]  # each region's D, in the same units
    next_position: Int[Array, "B"]  # first free position, in the same units
    words: Int[Array, "B"]  # words ever put into the previous text
    round: Int[Array, ""]  # rounds of the engine so far; ring indices come from it
    age: Int[Array, "B"]  # rounds of each stream so far
    turn: Int[Array, "B M"]  # tokens sampled in the current turn
    turn_length: Int[Array, "B"]
    done: Bool[Array, "B"]  # whether the current turn is closed or cut, or the stream is not active
    seen: Bool[Array, "B V"]  # ids visible or sampled in this turn (for the repetition penalty)
    watched: Float[Array, "B M W"]  # raw logits of `spec.watch` at every step of the turn
    spec: StreamSpec = dataclasses.field(metadata={"static": True})

    def replace(self, **changes: Any) -> "StreamState":
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a round is told, besides its frames. Absent question or query arrays make a shorter program."""

    time: Int[Array, "B time_capacity"]
    time_length: Int[Array, "B"]
    active: Bool[Array, "B"]  # streams that take part; every open stream must
    question: Int[Array, "B question_capacity"] | None = None  # before the clip
    question_length: Int[Array, "B"] | None = None
    query: Int[Array, "B query_capacity"] | None = None  # after the clip; a stream's first round only
    query_length: Int[Array, "B"] | None = None
    stamp: Int[Array, "B visuals stamp_capacity"] | None = None  # of each visual, where clips are stamped
    stamp_length: Int[Array, "B visuals"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """What one round said."""

    tokens: Int[Array, "B M"]
    length: Int[Array, "B"]  # tokens sampled; the rest of `tokens` is 0
    watched: Float[Array, "B M W"]
    cached: Int[Array, "B"]  # valid slots at the end of the turn


def slot_bytes(spec: StreamSpec, dtype: Any) -> int:
    """What keys and values of one slot take, in all layers; `dtype` is that of such as are not kept in eight bits."""
    t = spec.model.text
    row = (t.head_dim or 0) + 4 if spec.stream.kv == "int8" else (t.head_dim or 0) * jnp.dtype(dtype).itemsize
    return 2 * t.num_hidden_layers * t.num_key_value_heads * row


def keeps_closing(stream: StreamConfig) -> bool:
    """Whether a round turns the closing tokens' keys that are kept in eight bits: turned from what it was before, each would add its rounding."""
    return stream.kv is not None and stream.mode == "streaming" and stream.positions == "contiguous"


def state_shapes(spec: StreamSpec, streams: int, dtype: Any = jnp.float32) -> StreamState:
    """The state as `jax.ShapeDtypeStruct`s: what `init_state` would allocate."""
    return jax.eval_shape(lambda: init_state(spec, streams, dtype))


def prompt_shapes(spec: StreamSpec, streams: int, *, query: bool = False) -> Prompt:
    """A round's prompt as `jax.ShapeDtypeStruct`s: a later round's, or (`query`) a first one's."""

    def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((streams, *sizes), dtype)

    def ids(present: bool, *sizes: int) -> tuple[Any, Any]:
        return (shape(*sizes), shape(*sizes[:-1])) if present else (None, None)

    room, stamped = spec.stream.question_capacity, spec.model.vision.stamped
    return Prompt(
        *ids(True, spec.time_capacity),
        shape(dtype=jnp.bool_),
        *ids(room > 0, room),
        *ids(query, spec.query_capacity),
        *ids(stamped, len(spec.visuals) if stamped else 0, spec.stamp_capacity),
    )


def init_state(spec: StreamSpec, streams: int, dtype: Any = jnp.float32) -> StreamState:
    """No stream is open: `open_stream` opens a row. `dtype` is that of keys and values, where they are not kept in eight bits."""
    t, cache, layers = spec.model.text, spec.cache, spec.model.text.num_hidden_layers
    eight = spec.stream.kv == "int8"
    heads, head_dim = t.num_key_value_heads, t.head_dim or 0
    kept = 1 + len(spec.model.vision.deepstack_blocks) if spec.stream.mode == "recompute" else 0
    budget = spec.stream.max_new_tokens

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)

    def rows() -> Rows:
        shape = (streams, heads, cache.slots)
        return (
            Int8Rows(zeros(*shape, head_dim, dtype=jnp.int8), zeros(*shape, dtype=jnp.float32))
            if eight
            else zeros(*shape, head_dim, dtype=dtype)
        )

    closing = len(spec.prompt.block_close)

    return StreamState(
        k=tuple(rows() for _ in range(layers)),
        v=tuple(rows() for _ in range(layers)),
        closing=tuple(zeros(streams, heads, closing, head_dim, dtype=dtype) for _ in range(layers)) if keeps_closing(spec.stream) else (),
        embeddings=tuple(zeros(streams, 1, cache.slots, t.hidden_size, dtype=dtype) for _ in range(kept)),
        valid=zeros(streams, cache.slots, dtype=jnp.bool_),
        tokens=zeros(streams, cache.slots),
        coordinates=zeros(streams, 3, cache.slots),
        shift=zeros(streams, len(cache.regions)),
        next_position=zeros(streams),
        words=zeros(streams),
        round=zeros(),
        age=zeros(streams),
        turn=zeros(streams, budget),
        turn_length=zeros(streams),
        done=jnp.ones((streams,), jnp.bool_),
        seen=zeros(streams, t.vocab_size, dtype=jnp.bool_),
        watched=zeros(streams, budget, len(spec.watch), dtype=jnp.float32),
        spec=spec,
    )
