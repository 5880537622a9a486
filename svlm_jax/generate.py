"""Answers to chat prompts: the streaming engine with one room, one round and nothing evicted. Same cache, step and sampler."""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.config import ModelConfig, StreamConfig
from svlm_jax.data.chat import ChatPrompt, Part, lay_out
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import bind, compute_dtype, deep_rows, embed_prompt, join_features
from svlm_jax.streaming.layout import Field, Ring, StreamSpec, round_up
from svlm_jax.streaming.prompt import PromptLayout, spoken_ids
from svlm_jax.streaming.state import StreamState, init_state
from svlm_jax.streaming.step import Chunk, Run, decode, first_token
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Array, Bool, Int, Key, Params, UInt8

PROMPT_TILE = 64  # prompts are padded to multiples of this, so that few programs are compiled


class ChatCache:
    """One region with one room: the prompt's rows, then the answer's."""

    def __init__(self, rows: int, budget: int):
        fields = ((Field.HEADER, rows), (Field.GENERATED, budget - 1))
        self.rounds = Ring(region=0, start=0, rooms=1, horizon=1, fields=fields, question=0, query=0)
        self.slots = self.rounds.stop
        self.regions = ((0, self.slots),)


@dataclasses.dataclass(frozen=True)
class ChatSpec(StreamSpec):
    """A stream of one round whose prompt is any chat."""

    rows: int = PROMPT_TILE  # of the padded prompt
    denominator: int = 1

    @functools.cached_property
    def temporal_step(self) -> Fraction:
        return Fraction(1, self.denominator)

    @functools.cached_property
    def cache(self) -> ChatCache:  # type: ignore[override]
        return ChatCache(self.rows, self.stream.max_new_tokens)

    __hash__ = StreamSpec.__hash__


class Model(Protocol):
    """What `svlm_jax.load` returns."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> Params: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    tokens: list[int]  # all sampled ones, the closing <|im_end|> included
    logits: np.ndarray  # float32 [len(tokens), W]: raw logits of the watched ids, at each step


@functools.partial(jax.jit, donate_argnames="state")
def ingest_chat(
    params: Params,
    state: StreamState,
    tokens: Int[Array, "1 T"],
    valid: Bool[Array, "1 T"],
    positions: Int[Array, "1 T 3"],
    visuals: tuple[UInt8[Array, "1 _ 3 _ _"], ...],
    places: Int[Array, "1 C"],
    end: Int[Array, "1"],
    key: Key[Array, "1"],
) -> tuple[StreamState, Int[Array, "1"]]:
    """The prompt up to the answer's first token. Holes of the padded prompt stand in front."""
    spec = state.spec
    model = bind(spec.model, params)
    with jax.named_scope("vision"):
        features = join_features([model.vision(frames) for frames in visuals])
    with jax.named_scope("prefill"):
        x = embed_prompt(model, tokens, features.embedded if features else None, places)
        deep = deep_rows(x, features, places)
        chunk = Chunk(tokens, valid, positions, (Run(0, tokens.shape[1], 0),))
        return first_token(model, state.replace(next_position=end), chunk, x, key, jnp.ones((1,), jnp.bool_), deep=deep)


_decode = jax.jit(decode, donate_argnames="state")


def answer(
    params: Params,
    config: ModelConfig,
    layout: PromptLayout,
    prompt: ChatPrompt,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    watch: Sequence[int] = (),
) -> tuple[list[int], np.ndarray]:
    """Sampled tokens of one prompt, and the watched ids' raw logits at each step."""
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    stream = StreamConfig(mode="full", max_new_tokens=max_new_tokens, seed=seed, **settings)
    length, side = len(prompt.tokens), config.vision.merged_patch_size
    rows = round_up(length, PROMPT_TILE)
    spec = ChatSpec(
        model=config,
        stream=stream,
        prompt=layout,
        height=side,
        width=side,
        time_capacity=0,
        query_capacity=0,
        watch=tuple(watch),
        rows=rows,
        denominator=prompt.unit,
    )
    hole = rows - length
    state = init_state(spec, 1, compute_dtype(params))
    key = jax.random.key(seed)[None]
    state, _ = ingest_chat(
        params,
        state,
        np.pad(prompt.tokens, (hole, 0))[None],
        (np.arange(rows) >= hole)[None],
        np.pad(prompt.positions, ((hole, 0), (0, 0)))[None],
        tuple(frames[None] for frames in prompt.visuals),
        (prompt.places + hole)[None],
        np.asarray([prompt.end], np.int32),
        key,
    )
    _, turn = _decode(params, state, key)
    count = int(turn.length[0])
    return np.asarray(turn.tokens)[0, :count].tolist(), np.asarray(turn.watched)[0, :count]


def chat_parts(messages: Sequence[dict[str, Any]], *, system: str = "You are a helpful assistant.") -> list[Part]:
    """Chat messages as prompt parts, in Qwen2.5-VL's template.

    A message is `{"role": "user", "content": TEXT}` or has a list of parts: str, `data.chat.Image`, `data.chat.Clip`.
    """
    if not messages:
        raise UserError("no messages: give at least one from the user")
    parts: list[Part] = []
    if messages[0].get("role") != "system":
        parts.append(f"<|im_start|>system\n{system}<|im_end|>\n")
    for message in messages:
        if message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"a message has role {message.get('role')!r}: system, user or assistant")
        content = message["content"]
        parts += [f"<|im_start|>{message['role']}\n", *([content] if isinstance(content, str) else content), "<|im_end|>\n"]
    return [*parts, "<|im_start|>assistant\n"]


def generate(model: Model, prompt: str | Sequence[Part] | Sequence[dict[str, Any]], **settings: Any) -> Answer:
    """The model's answer to a chat.

    Args:
      model: from `svlm_jax.load`.
      prompt: a question; chat messages; or raw parts (text with its special tokens, images and clips).
      settings: of `answer`: max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, watch.

    Raises:
      UserError: pictures of a wrong size or type, unknown roles, an empty prompt.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    raw = [*prompt]
    parts = chat_parts(raw) if raw and isinstance(raw[0], dict) else raw  # type: ignore[arg-type]
    layout = PromptLayout.from_tokenizer(model.tokenizer)
    laid = lay_out(parts, model.tokenizer, layout, model.config.vision)  # type: ignore[arg-type]
    tokens, logits = answer(model.params, model.config, layout, laid, **settings)
    return Answer(model.tokenizer.decode(spoken_ids(tokens, layout)).strip(), tokens, logits)
