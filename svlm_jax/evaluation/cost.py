"""What a run will take, before it begins: hours on the device that the rates were measured on, and the judge's tokens."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from svlm_jax.errors import UserError
from svlm_jax.evaluation.journal import read_journal
from svlm_jax.evaluation.judge import LONGEST, VERDICTS, Question

CHARACTERS_A_TOKEN = 4.0  # of English text, as a rule of thumb
RATES = Path(__file__).parent.parent.parent / "benchmarks" / "h100_7b_stream.json"  # in a checkout; a wheel has none
GAMES, GAME_HOURS = 20, 2.12  # of Inf-Streams-Eval as published (arXiv 2510.09608)
WORD = 5.7  # characters of an English word and its blank
LEAST_WORDS = 200  # of a published segment's reference
PRICE = (1.25, 10.0)  # dollars a million tokens in and out: gpt-5's list price when it came out, the published judge


class Rate(NamedTuple):
    """A measured round."""

    round_ms: float  # all streams of the batch together
    streams: int
    device: str
    commit: str
    date: str


class Judging(NamedTuple):
    """Questions and what they weigh; answers are a letter each, and what a reasoning model thinks comes on top."""

    questions: int
    prompt_tokens: int
    answer_tokens: int


def read_rate(path: Path | None, *, fps: float, streams: int) -> Rate:
    """The measured round at this rate of frames, of as many streams or else of the next fewer. Raises UserError where there is none."""
    path = path or RATES
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        fitting = [
            row
            for row in rows
            if row["fps"] == fps and row["streams"] <= streams and row["chunk_seconds"] == 1 and row["mode"] == "streaming"
        ]
        row = max(fitting, key=lambda row: (row["streams"], row["date"]))
        return Rate(row["pipelined_round_ms"], row["streams"], row["device"], row["commit"], row["date"][:10])
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: give measured rates with --rates FILE, as `svlm bench stream --json` writes them"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__} {error}"
        raise UserError(
            f"{path} has no round at {fps:g} frames a second ({what}): measure one with `svlm bench stream`, or change --fps"
        ) from None


def device_hours(rate: Rate, seconds: float) -> float:
    """Hours for so many seconds of video, one round a second."""
    return seconds / rate.streams * rate.round_ms / 3.6e6


def judging(prompt: str, texts: Sequence[tuple[int, int, int]]) -> Judging:
    """For pairs whose reference and two commentaries have so many characters."""
    each = [len(prompt) + sum(min(LONGEST, count) for count in pair) for pair in texts]
    return Judging(2 * len(texts), round(2 * sum(each) / CHARACTERS_A_TOKEN), 2 * len(texts))


def weigh(questions: Iterable[Question]) -> Judging:
    """Questions that are written already."""
    lengths = [sum(len(message["content"]) for message in question.messages) for question in questions]
    return Judging(len(lengths), round(sum(lengths) / CHARACTERS_A_TOKEN), len(lengths))


def lines(seconds: float, rate: Rate | None, judged: Judging | None, price: tuple[float, float], checkpoints: int) -> list[str]:
    """What a person is told."""
    told = [f"video: {seconds / 3600:,.1f} hours of stream for each checkpoint"]
    if rate is not None:
        hours = device_hours(rate, seconds)
        measured = (
            f"{rate.round_ms:.1f} ms a round of {rate.streams} stream{'s' * (rate.streams > 1)}, measured {rate.date} at {rate.commit}"
        )
        many = f"{checkpoints} checkpoint{'s' * (checkpoints != 1)}"
        told.append(f"device: {checkpoints * hours:,.1f} hours on one {rate.device} for {many} ({measured})")
    if judged is not None:
        told.append(f"judge: {judged.questions:,} questions, about {weight(judged, price)}")
        told.append(f"       and {judged.answer_tokens:,} tokens out, to which a reasoning judge adds what it thinks")
    return told


def weight(judged: Judging, price: tuple[float, float]) -> str:
    """The tokens, and what they cost."""
    cost = (judged.prompt_tokens * price[0] + judged.answer_tokens * price[1]) / 1e6
    tokens = f"{judged.prompt_tokens / 1e6:,.2f} million" if judged.prompt_tokens >= 1e5 else f"{judged.prompt_tokens:,}"
    return f"{tokens} tokens in ({cost:,.2f} at {price[0]:g} in and {price[1]:g} out a million)"


def as_measured(folder: Path, questions: int, price: tuple[float, float]) -> list[str]:
    """The same by what the answers in a run's folder took, thinking included; nothing where no server has told."""
    told = [row["tokens"] for row in read_journal(folder / VERDICTS) if sum(row.get("tokens") or ())]
    if not told:
        return []
    each = [sum(row[i] for row in told) / len(told) for i in range(2)]
    judged = Judging(questions, *(round(questions * tokens) for tokens in each))
    found = f"by the {len(told):,} answers in {folder}, of {each[0]:,.0f} tokens in and {each[1]:,.0f} out"
    return [f"       {found}: {weight(judged, price)}"]


def published(start: float, segment: float) -> tuple[float, int]:
    """Seconds of stream in the published benchmark, and its segments at most: those with few words are left out, and not counted here."""
    seconds = max(0.0, GAME_HOURS * 3600 - start)
    return GAMES * seconds, GAMES * int(seconds / segment)
