"""The server's events of OpenAI's Realtime API (the generally available form), text alone; what it has no word for stands under `svlm`."""

import secrets
from typing import Any

from svlm_jax.errors import UserError

Json = dict[str, Any]


def new(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(8)}"


def event(type: str, **fields: Any) -> Json:
    return {"type": type, "event_id": new("event"), **fields}


def error(fault: UserError, about: str | None = None) -> Json:
    """`about` is the `event_id` of the client's event that was wrong. Where it helps to wait, `svlm` says how many seconds."""
    kind, retry = getattr(fault, "kind", "invalid_request_error"), getattr(fault, "retry_after", None)
    extras = {"svlm": {"retry_after": retry}} if retry is not None else {}
    return event("error", error={"type": kind, "code": None, "message": str(fault), "param": None, "event_id": about}, **extras)


def session(id: str, model: str, instructions: str, budget: int, extras: Json) -> Json:
    """What a session is like, for `session.created` and `session.updated`."""
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": id,
        "model": model,
        "instructions": instructions,
        "output_modalities": ["text"],
        "max_output_tokens": budget,
        "svlm": extras,
    }


class Response:
    """One round's answer, from `response.created` to `response.done`."""

    def __init__(self, start: float):
        self.id, self.item_id, self.start = new("resp"), new("item"), start
        self.text = ""  # sent so far
        self._begun = False

    @property
    def _at(self) -> Json:
        return {"response_id": self.id, "output_index": 0}

    def _item(self, status: str) -> Json:
        content = [{"type": "output_text", "text": self.text}] if status != "in_progress" else []
        return {"id": self.item_id, "object": "realtime.item", "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[Json], **more: Any) -> Json:
        return {"id": self.id, "object": "realtime.response", "status": status, "output": output, "output_modalities": ["text"], **more}

    def created(self) -> Json:
        return event("response.created", response=self._response("in_progress", []), svlm={"start": self.start})

    def begin(self, words: str) -> list[Json]:
        """The first words."""
        part = {"type": "text", "text": ""}
        self._begun = True
        return [
            self.created(),
            event("response.output_item.added", **self._at, item=self._item("in_progress")),
            event("response.content_part.added", **self._at, item_id=self.item_id, content_index=0, part=part),
            self._delta(words),
        ]

    def _delta(self, words: str) -> Json:
        self.text += words
        return event("response.output_text.delta", **self._at, item_id=self.item_id, content_index=0, delta=words)

    def finish(self, text: str, tokens: int, extras: Json) -> list[Json]:
        """The rest of the words. `tokens` is how many were sampled."""
        events: list[Json] = []
        if not self._begun:
            events += self.begin(text)
        elif len(text) > len(self.text) and text.startswith(self.text):
            events.append(self._delta(text[len(self.text) :]))
        self.text = text
        place = {**self._at, "item_id": self.item_id, "content_index": 0}
        item, usage = self._item("completed"), {"total_tokens": tokens, "output_tokens": tokens, "input_tokens": 0}
        return [
            *events,
            event("response.output_text.done", **place, text=text),
            event("response.content_part.done", **place, part={"type": "text", "text": text}),
            event("response.output_item.done", **self._at, item=item),
            event("response.done", response=self._response("completed", [item], usage=usage), svlm=extras),
        ]

    def silent(self, extras: Json) -> list[Json]:
        """A round in which nothing was said: a response without output."""
        begun = [] if self._begun else [self.created()]
        return [*begun, event("response.done", response=self._response("completed", []), svlm=extras)]

    def cancel(self) -> Json:
        item = [self._item("incomplete")] if self._begun else []
        details = {"type": "cancelled", "reason": "client_cancelled"}
        return event("response.done", response=self._response("cancelled", item, status_details=details), svlm={"start": self.start})
