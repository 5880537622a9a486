"""`/v1/chat/completions`: answers about pictures and short clips, in OpenAI's form, by `svlm_jax.generate`.

One at a time, in a thread of its own: rounds of live streams go on in between. The first prompt of a size has to be compiled.
"""

import asyncio
import json
import os
import re
import tempfile
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from svlm_jax.data.chat import Clip, Image, Part, lay_out
from svlm_jax.demo.bundle import clip_path
from svlm_jax.errors import UserError
from svlm_jax.generate import Answer, answer, chat_parts
from svlm_jax.serving import realtime_events as wire
from svlm_jax.serving.child import Decoder
from svlm_jax.serving.decoder import STAMP
from svlm_jax.serving.guard import read_json
from svlm_jax.serving.limits import Full, Refused
from svlm_jax.serving.origins import is_url
from svlm_jax.serving.realtime import data_uri
from svlm_jax.serving.service import Service
from svlm_jax.serving.sessions import LOADING, check_text
from svlm_jax.streaming.prompt import PromptLayout, spoken_ids

MOST_TOKENS, USUAL_TOKENS = 1024, 128  # of an answer
PROMPT_TOKENS = 16_384
SPECIAL = re.compile(r"<\|[a-z_]+\|>")  # how templates write structural tokens: nobody's text may hold them
IGNORED = {"user", "store", "metadata", "stream_options"}
DEFAULTS: dict[str, tuple[Any, ...]] = {  # what is taken at its default alone, as clients send it
    "n": (1,),
    "stop": ([], ""),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
}
KNOWN = {"model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "media_io_kwargs"}


class Chat:
    """The endpoint."""

    def __init__(self, service: Service):
        self.service, self.limits = service, service.limits
        self._thread = ThreadPoolExecutor(1, "chat")
        self._waiting = 0

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def complete(self, request: Request) -> Response:
        if not self.service.ready:
            raise Full(LOADING)
        body = await read_json(request, self.limits.chat_bytes, 3 * self.limits.body_seconds)
        settings = self._settings(body)
        if self._waiting > self.limits.chat_waiting:
            self.service.metrics.chats.labels("refused").inc()
            raise Full(f"{self._waiting} chats wait already: try again later")
        self._waiting += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, body.get("messages"), self._spread(body), settings)
            said, prompt_tokens = await work
        except Exception:
            self.service.metrics.chats.labels("failed").inc()
            raise
        finally:
            self._waiting -= 1
        self.service.metrics.chats.labels("answered").inc()
        closed = bool(said.tokens) and said.tokens[-1] == self.service.spec.prompt.im_end
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(said.tokens), "total_tokens": prompt_tokens + len(said.tokens)}
        head = {"id": wire.new("chatcmpl"), "created": int(time.time()), "model": self.service.name}
        reason = "stop" if closed else "length"
        if body.get("stream"):
            return StreamingResponse(_chunks(head, said.text, reason, usage), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        message = {"role": "assistant", "content": said.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _settings(self, body: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(body) - KNOWN - IGNORED - set(DEFAULTS))
        if unknown:
            raise Refused(f"there is no setting {unknown[0][:40]!r} of a chat")
        if body.get("model") not in (None, self.service.name):
            raise Refused(f"there is no model {str(body.get('model'))[:60]!r} here, but {self.service.name!r}", status=404)
        for name, taken in DEFAULTS.items():
            if body.get(name) is not None and body[name] not in taken:
                raise Refused(f"one answer is given, in text and to its end: {name} cannot be set")
        tokens = body.get("max_completion_tokens", body.get("max_tokens")) or USUAL_TOKENS
        settings = {
            "max_new_tokens": _number("max_tokens", tokens, 1, MOST_TOKENS, whole=True),
            "temperature": _number("temperature", body.get("temperature", 1.0), 0, 10),
            "top_p": _number("top_p", body.get("top_p"), 1e-6, 1),
            "seed": _number("seed", body.get("seed", 0), -(2**63), 2**63 - 1, whole=True),
        }
        return {name: value for name, value in settings.items() if value is not None}

    def _spread(self, body: dict[str, Any]) -> int | None:
        """How many frames a clip is to have, spread over all of it, as vLLM's clients say it; None: all at the server's rate."""
        given = body.get("media_io_kwargs")
        video = given.get("video", {}) if isinstance(given, dict) else given
        if given is not None and (not isinstance(video, dict) or set(given) - {"video"} or set(video) - {"num_frames"}):
            raise Refused("media_io_kwargs can say one thing: {\"video\": {\"num_frames\": N}}")
        return _number("num_frames", (video or {}).get("num_frames"), 1, self.limits.chat_frames, whole=True)

    def _answer(self, messages: Any, spread: int | None, settings: dict[str, Any]) -> tuple[Answer, int]:
        """In the chat's thread: decodes, lays out, runs."""
        model = self.service.model
        assert model is not None
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise Refused("messages must be a list of at least one message")
        room = self.limits.chat_frames
        told: list[dict[str, Any]] = []
        for message in messages:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            read: list[Part] = []
            for part in parts:
                piece, frames = self._part(part, room, spread)
                room -= frames
                read.append(piece)
            told.append({"role": message.get("role"), "content": read})
        layout = PromptLayout.from_tokenizer(model.tokenizer)
        prompt = lay_out(chat_parts(told), model.tokenizer, layout, model.config.vision)
        if len(prompt.tokens) > PROMPT_TOKENS:
            raise Refused(f"the prompt has {len(prompt.tokens):,} tokens and {PROMPT_TOKENS:,} are the most: send less")
        tokens, logits = answer(model.params, model.config, layout, prompt, **settings)
        return Answer(model.tokenizer.decode(spoken_ids(tokens, layout)).strip(), tokens, logits), len(prompt.tokens)

    def _part(self, part: Any, room: int, spread: int | None) -> tuple[Part, int]:
        """A part of a message, and how many frames it has. Refused for what cannot be used."""
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            return SPECIAL.sub("", check_text(part.get("text"), "a message", 10 * self.limits.text_characters)), 0
        if kind not in ("image_url", "video_url"):
            raise Refused("a message's part is of type text, image_url or video_url")
        named = part.get(kind)
        url = named.get("url") if isinstance(named, dict) else named
        if room < 1:
            raise Refused(f"{self.limits.chat_frames} frames are the most of one chat")
        decoded = self._decode(check_text(url, kind, self.limits.chat_bytes), "image" if kind == "image_url" else "video", room, spread)
        return (Image(decoded.frames[0]), 1) if kind == "image_url" else (decoded, len(decoded.frames))

    def _decode(self, url: str, kind: str, room: int, spread: int | None) -> Clip:
        """A clip, or a picture as one of a single frame, by a process of its own."""
        draft = ""
        try:
            if url.startswith("data:"):
                with tempfile.NamedTemporaryFile(prefix="svlm-", delete=False) as file:
                    draft = file.name
                    file.write(data_uri(url))
                source = draft
            elif kind == "image":
                raise Refused("a picture must be a data URI: data:image/jpeg;base64,...")
            elif url == "sample":
                source = str(clip_path())
            elif url.startswith("file:///"):
                source = self.service.config.allowed.file(urllib.parse.unquote(url.removeprefix("file://")))
            else:
                source = self.service.config.allowed.url(url) if is_url(url) else self.service.config.allowed.file(url)
            s = self.service.spec.stream
            sizes = {"max_pixels": s.max_pixels, "frame_pixels": self.limits.frame_pixels, "memory": self.limits.decoder_bytes}
            decoder = Decoder(mode="visual", kind=kind, source=source, fps=s.fps, most_frames=room, spread=spread, **sizes)
            try:
                return _collect(decoder, self.limits.stall_seconds)
            except UserError as error:
                told = str(error).replace(source, "the clip" if kind == "video" else "the picture")
                raise Refused(told) from None
            finally:
                decoder.close()
        finally:
            if draft:
                os.unlink(draft)


def _collect(decoder: Decoder, seconds: float) -> Clip:
    timer = threading.Timer(seconds, decoder.close)
    timer.daemon = True
    timer.start()
    about: dict[str, Any] = {}
    try:
        for kind, payload in decoder.messages():
            if kind == b"I":
                about = json.loads(payload)
            elif kind == b"E":
                raise UserError(payload.decode())
            elif kind == b"F":
                shape = (about["frames"], 3, about["height"], about["width"])
                return Clip(np.frombuffer(payload[STAMP.size :], np.uint8).reshape(shape), about["fps"])
    finally:
        timer.cancel()
    raise UserError("nothing could be decoded")


async def _chunks(head: dict[str, Any], text: str, reason: str, usage: dict[str, int]) -> AsyncIterator[str]:
    """The answer as a stream's chunks. It is known whole, so its words are one of them."""
    for delta, finish in (({"role": "assistant", "content": ""}, None), ({"content": text}, None), ({}, reason)):
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        more = {"usage": usage} if finish else {}
        yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice], **more}, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


def _number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not least <= value <= most:
        raise Refused(f"{name} must be a number from {least:g} to {most:g}")
    return value if whole else float(value)
