"""A judge of pairs: which of two commentaries is the better one, asked in both orders, each question paid for once.

Every answer is in the journal before it counts, under a digest of model and question: neither a kill nor another run of the same
folder asks again. What is no clear letter is asked anew a few times and then counts as no verdict, for neither side.
"""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Literal, NamedTuple

from svlm_jax.evaluation.endpoint import Endpoint, Failure, Line, Message, Reply
from svlm_jax.evaluation.journal import Journal, Row

LONGEST = 8_000  # characters of each text that the judge is shown, as published
ASKS = 3  # answers without a verdict after which a question has none
VERDICTS = "verdicts.jsonl"  # the journal, in a run's folder
KEPT = 400  # characters of an answer that the journal keeps
Vote = Literal["a", "b"]
Unclear = Literal["refusal", "malformed"]

STREAM_PROMPT = """\
You compare two live commentaries, A and B, on the same stretch of a sports broadcast. A transcript of what the broadcaster said is given \
as a reference for tone and for what was on the screen.
Weigh first how well a commentary works on air: live calls or short analysis of the moment, with changing emotion and pace, and more than a \
description of pictures. Weigh then whether its details fit the events and stay free of contradictions.
Reply with one capital letter and nothing else: A or B, for the better commentary. You must choose."""

EVENT_PROMPT = """\
You compare two commentaries, A and B, on the same event of a sports video with what a human commentator said.
Weigh how much of the human commentary's meaning, details and main points each conveys, and how close each comes to its manner: tone, choice \
of words, structure.
Reply with one capital letter and nothing else: A or B, for the commentary closer to the human one. You must choose."""

_LETTER = re.compile(
    r"[\W_]*(?:(?:(?:the|my)\W+)?(?:final\W+)?(?:answer|verdict|winner|choice|vote|option|response|boxed|candidate|commentary|better(?:\s+commentary)?)\W+"
    r"(?:is\W+)?(?:(?:candidate|commentary|option)\W+)?)?"
    r"([AB])(?:\W+is\W+(?:the\W+)?better(?:\W+commentary)?)?(?:\W*</answer)?[\W_]*",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(?:I\s+(?:can(?:no|['’])t|won['’]t|am\s+(?:unable|not\s+able))|I['’]m\s+(?:sorry|unable|not\s+able)|unable\s+to\s+(?:assist|comply|help))\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is compared."""

    name: str
    reference: str
    a: str
    b: str


class Question(NamedTuple):
    """One order of a pair, as it is asked."""

    key: str
    messages: list[Message]


class Votes(NamedTuple):
    """Of one pair: with A shown first, and with B shown first."""

    ab: Vote | Unclear
    ba: Vote | Unclear

    def count(self, side: Vote) -> int:
        return (self.ab == side) + (self.ba == side)


def question(model: str, prompt: str, reference: str, first: str, second: str) -> Question:
    """What the judge is shown, and the digest that its answer is kept under."""
    parts = (("Reference transcript", reference), ("Commentary A", first), ("Commentary B", second))
    shown = "\n\n".join(f"{title}:\n{text.strip()[:LONGEST]}" for title, text in parts)
    messages: list[Message] = [{"role": "system", "content": prompt}, {"role": "user", "content": shown}]
    key = hashlib.blake2b(json.dumps([model, messages]).encode(), digest_size=16).hexdigest()
    return Question(key, messages)


def read_verdict(reply: Reply) -> Literal["A", "B"] | Unclear:
    """The letter, where the answer is one and little else."""
    text = _THOUGHT.sub("", reply.text).strip()
    if not reply.refused and (found := _LETTER.fullmatch(text)):
        return "A" if found[1].upper() == "A" else "B"
    return "refusal" if reply.refused or _REFUSAL.search(text) else "malformed"


class Verdicts:
    """What the journal knows of each question."""

    def __init__(self, journal: Journal):
        self._journal = journal
        self._known: dict[str, str] = {}
        self._unclear: collections.Counter[str] = collections.Counter()
        for row in journal.rows:
            self._learn(row)

    def _learn(self, row: Row) -> None:
        key, outcome = row.get("key"), row.get("outcome")
        if outcome in ("A", "B"):
            self._known.setdefault(str(key), outcome)  # the first one stands
        elif outcome in ("refusal", "malformed"):
            self._unclear[str(key)] += 1
            if self._unclear[str(key)] >= ASKS:
                self._known.setdefault(str(key), outcome)

    def __getitem__(self, key: str) -> str | None:
        """A, B, refusal or malformed; None where the question has to be asked."""
        return self._known.get(key)

    def note(self, row: Row) -> None:
        self._journal.append(row)
        self._learn(row)


def judge(
    pairs: Sequence[Pair],
    endpoint: Endpoint,
    journal: Journal,
    *,
    prompt: str,
    workers: int = 8,
    before: Callable[[Sequence[Question]], None] = lambda waiting: None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Votes]:
    """The votes on each pair. `before` hears what has to be asked, before it is.

    Raises UserError when the endpoint cannot be asked any more; what was answered by then is kept.
    """
    orders = {
        pair.name: tuple(question(endpoint.model, prompt, pair.reference, *texts) for texts in ((pair.a, pair.b), (pair.b, pair.a)))
        for pair in pairs
    }
    verdicts, line = Verdicts(journal), Line(endpoint)
    every = {asked.key: asked for order in orders.values() for asked in order}
    waiting = [asked for key, asked in every.items() if verdicts[key] is None]
    before(waiting)
    told(len(every) - len(waiting), len(every))
    with ThreadPoolExecutor(max(1, workers), "judge") as pool:
        work = [pool.submit(_settle, asked, line, verdicts) for asked in waiting]
        try:
            for done, future in enumerate(as_completed(work), len(every) - len(waiting) + 1):
                future.result()
                told(done, len(every))
        except BaseException:
            line.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)  # answers on their way are paid for, and are kept
            raise
    letters: Mapping[str, str] = {key: verdicts[key] or "malformed" for key in every}
    return {name: Votes(_vote(letters[ab.key], "a", "b"), _vote(letters[ba.key], "b", "a")) for name, (ab, ba) in orders.items()}


def _vote(letter: str, first: Vote, second: Vote) -> Vote | Unclear:
    return first if letter == "A" else second if letter == "B" else "refusal" if letter == "refusal" else "malformed"


def _settle(asked: Question, line: Line, verdicts: Verdicts) -> None:
    """Asks until there is a verdict, or none to be had."""

    def failed(failure: Failure) -> None:
        verdicts.note({"key": asked.key, "outcome": failure.kind})

    while verdicts[asked.key] is None:
        reply = line.request(asked.messages, failed)
        tokens = [reply.prompt_tokens, reply.answer_tokens]
        verdicts.note({"key": asked.key, "outcome": read_verdict(reply), "reply": reply.text[:KEPT], "tokens": tokens})


def requests_table(rows: Iterable[Row]) -> dict[str, int]:
    """How many requests had which outcome, all runs of the folder together, and their tokens."""
    counts: collections.Counter[str] = collections.Counter()
    for row in rows:
        outcome = str(row.get("outcome"))
        counts["verdict" if outcome in ("A", "B") else outcome] += 1
        prompt, answer = row.get("tokens") or (0, 0)
        counts["prompt_tokens"] += prompt
        counts["answer_tokens"] += answer
    return dict(sorted(counts.items()))
