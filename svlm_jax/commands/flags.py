"""The flags of a stream: the names, or `dest`, are those of StreamConfig's fields."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svlm_jax.commands import UsageError
from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError

FORMATS = (".vtt", ".srt", ".jsonl")
_DEFAULTS = StreamConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of `svlm caption`."""
    parser.add_argument("source", nargs="?", metavar="VIDEO", help="a file or URL (default: the bundled clip)")
    _add_model(parser)
    out = "also write the captions to a .vtt, .srt or .jsonl file; repeatable"
    parser.add_argument("--out", metavar="FILE", type=_out, action="append", default=[], help=out)
    truth = "also show what an annotation file says (default: not; without FILE: VIDEO.jsonl, as `svlm demo match` writes it)"
    parser.add_argument("--truth", metavar="FILE.jsonl", nargs="?", const="", help=truth)
    parser.add_argument("--start", metavar="SECONDS", type=_not_negative, default=0.0, help="where to begin (default: 0)")
    parser.add_argument("--duration", metavar="SECONDS", type=_positive, help="how much to caption (default: to the end)")
    _add_cache(parser)
    _add_watching(parser)

    remember = parser.add_argument_group("remembering")
    _add_windows(remember)
    _add(remember, "--text-capacity", "text_capacity", "room for older words where sink and sliding are off", metavar="TOKENS", type=int)
    how = "streaming: constant memory, for ever; full: forgets nothing; windows: starts anew every window; recompute: runs its window anew"
    _add(remember, "--mode", "mode", how, choices=("streaming", "full", "windows", "recompute"))
    _add_positions(remember)
    _add_kv(remember)
    room = "rounds that --mode full has room for (default: those of the video)"
    remember.add_argument("--capacity-rounds", metavar="ROUNDS", type=int, default=argparse.SUPPRESS, help=room)

    say = parser.add_argument_group("saying")
    _add_query(say)
    question = "a question put in mid-stream, in the round of that second; repeatable"
    say.add_argument("--question", dest="questions", metavar="TEXT@SECONDS", type=_question, action="append", default=[], help=question)
    _add(say, "--previous-text", "previous_text", "what was said before the video begins", metavar="TEXT")
    _add_sampling(say)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all streams of a server, which share one engine: of those above what has a meaning for live video."""
    _add_model(parser)
    _add_cache(parser)
    _add_watching(parser)
    remember = parser.add_argument_group("remembering")
    _add_windows(remember, count=int)
    _add_positions(remember)
    _add_kv(remember)
    say = parser.add_argument_group("saying")
    _add_query(say)
    _add_sampling(say)


def _add(group: Any, name: str, field: str, text: str, **how: Any) -> None:
    default = getattr(_DEFAULTS, field)
    shown = "off" if default is None else "none" if default == "" else default
    group.add_argument(name, dest=field, default=argparse.SUPPRESS, help=f"{text} (default: {shown})", **how)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face model directory, or a name on the Hub (default: the bundled one)")
    parser.add_argument("--weights", metavar="DIR", help="take the weights from here; config and tokenizer stay those of --model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and computation (default: as the weights are stored)")
    eight = (
        "keep the weights of the decoder's products and of the head in 8 bits, a scale for each output; "
        "fp8_products: those of vision too, and multiply prefill and vision in 8 bits (default: off)"
    )
    parser.add_argument("--quantize", choices=("int8", "fp8", "fp8_products"), help=eight)
    add_mesh(parser)


def add_mesh(parser: Any) -> None:
    """The devices that share the work."""
    share = "devices that share the work: streams split over data, heads and MLP over tensor (default: one device)"
    parser.add_argument("--mesh", metavar="data=N,tensor=N", type=_mesh, help=share)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-compilation-cache", action="store_true", help="compile anew, and keep nothing on disk")


def _add_watching(parser: argparse.ArgumentParser) -> None:
    watch = parser.add_argument_group("watching")
    _add(watch, "--fps", "fps", "frames a second that the model sees", metavar="RATE", type=_number)
    _add(watch, "--chunk", "chunk_seconds", "seconds of video a round", metavar="SECONDS", type=_number)
    _add(watch, "--max-pixels", "max_pixels", "pixels of a frame after resizing, at most", metavar="N", type=int)
    _add(watch, "--vision-window", "vision_window", "rounds of video that the model remembers", metavar="ROUNDS", type=int)


def _add_windows(remember: Any, count: Callable[[str], Any] | None = None) -> None:
    """`count` reads a number of tokens; None: one that may be off."""
    off, how = ("", count) if count else (", or off", _count_or_off)
    _add(remember, "--text-window", "text_window", "rounds whose words it remembers in their place", metavar="ROUNDS", type=int)
    _add(remember, "--text-sink", "text_sink", f"first tokens of older words kept for ever{off}", metavar="TOKENS", type=how)
    _add(remember, "--text-sliding", "text_sliding", f"last tokens of older words kept{off}", metavar="TOKENS", type=how)
    again = "rounds after which older words are read anew, as text alone; 0: they stay as they were when they were said"
    _add(remember, "--text-refresh", "text_refresh", again, metavar="ROUNDS", type=int)


def _add_positions(remember: Any) -> None:
    _add(remember, "--positions", "positions", "of what is left when older rounds leave", choices=("contiguous", "append"))


def _add_kv(remember: Any) -> None:
    _add(remember, "--kv", "kv", "keep keys and values in 8 bits, a scale for each token and head", choices=("int8",))


def _add_query(say: Any) -> None:
    _add(say, "--query", "query", "what the model is asked to do, in its first round", metavar="TEXT")


def _add_sampling(say: Any) -> None:
    _add(say, "--max-new-tokens", "max_new_tokens", "tokens a round, at most", metavar="N", type=int)
    _add(say, "--temperature", "temperature", "of sampling; 0 takes the likeliest token", metavar="T", type=_number)
    _add(say, "--top-k", "top_k", "sample from the K likeliest tokens", metavar="K", type=int)
    _add(say, "--top-p", "top_p", "sample from the likeliest tokens of probability P together", metavar="P", type=_number)
    _add(say, "--repetition-penalty", "repetition_penalty", "above 1, what it remembers is less likely", metavar="P", type=_number)
    _add(say, "--seed", "seed", "of sampling", metavar="N", type=int)


def stream_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of StreamConfig that flags were given for. Raises UsageError where they do not go together."""
    names = [field.name for field in dataclasses.fields(StreamConfig)]
    fields = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.weights and not args.model:
        raise UsageError("--weights needs --model, which has the config and the tokenizer that go with them")
    try:
        StreamConfig(**fields)
    except UserError as error:
        raise UsageError(str(error)) from None
    return fields


# Values of flags


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _not_negative(text: str) -> float:
    if _number(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return _number(text)


def _positive(text: str) -> float:
    if _number(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return _number(text)


def _mesh(text: str) -> dict[str, int]:
    """Axis: devices."""
    sizes = {"data": 1, "tensor": 1}
    given = [part.strip().partition("=") for part in text.split(",")]
    names = [name for name, _, _ in given]
    for name, _, count in given:
        if name not in sizes or names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{text!r} must name data, tensor or both, once each, such as data=2,tensor=2")
        if not (count.isdecimal() and int(count)):
            raise argparse.ArgumentTypeError(f"{text!r}: {name} must be a number of devices, at least 1")
        sizes[name] = int(count)
    return sizes


def _count_or_off(text: str) -> int | None:
    if text.lower() == "off":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of tokens, or off") from None


def _out(text: str) -> str:
    if Path(text).suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return text


def _question(text: str) -> tuple[str, float]:
    """TEXT@SECONDS; the last @ counts."""
    words, _, when = text.rpartition("@")
    try:
        if words.strip():
            return words.strip(), _not_negative(when)
    except argparse.ArgumentTypeError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a text, @ and a time in seconds, such as 'Who scored?@12.5'")
