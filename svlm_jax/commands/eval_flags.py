"""Flags that the benchmarks of commentary share."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from svlm_jax.commands import UsageError
from svlm_jax.commands.flags import _count_or_off, _number, _positive, add_mesh
from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError

STREAM_FLAGS = {  # flag -> (field of StreamConfig, type, help)
    "--fps": ("fps", _number, "frames a second"),
    "--max-pixels": ("max_pixels", int, "pixels of a frame, at most"),
    "--vision-window": ("vision_window", int, "rounds of video that are remembered"),
    "--text-window": ("text_window", int, "rounds whose words are remembered in their place"),
    "--text-sink": ("text_sink", _count_or_off, "first tokens of older words that are kept, or off"),
    "--text-sliding": ("text_sliding", _count_or_off, "last tokens of older words that are kept, or off"),
    "--text-refresh": ("text_refresh", int, "rounds after which older words are read anew; 0: never"),
    "--max-new-tokens": ("max_new_tokens", int, "tokens a round, at most"),
    "--mode": ("mode", str, "streaming, full, windows or recompute"),
    "--positions": ("positions", str, "contiguous or append"),
    "--kv": ("kv", str, "int8: keys and values in 8 bits"),
    "--temperature": ("temperature", _number, "of sampling"),
    "--repetition-penalty": ("repetition_penalty", _number, "above 1, what is remembered is less likely"),
    "--query": ("query", str, "what is asked for"),
    "--seed": ("seed", int, "of sampling"),
}
SIDE = "a checkpoint (directory, or name on the Hub), a result file or folder of .jsonl, or URL#MODEL; NAME=... to call it otherwise"


def add_sides(parser: argparse.ArgumentParser) -> None:
    """Contestants, judge, folder, and how a checkpoint is run."""
    parser.add_argument("--a", metavar="WHO", help=SIDE)
    parser.add_argument("--b", metavar="WHO", help="whom to compare it with, likewise")
    parser.add_argument("--videos", metavar="DIR", default="", help="folder that the paths of videos are relative to")
    parser.add_argument("--out", metavar="DIR", help="the run's folder: results, verdicts and report")
    plots = "also draw the measures over stream time into this .png or .svg (needs matplotlib)"
    parser.add_argument("--plots", metavar="FILE", type=_picture, help=plots)

    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge", metavar="URL#MODEL", help="any server of OpenAI's chat completions; its key is in OPENAI_API_KEY")
    judge.add_argument("--judge-prompt", metavar="FILE", help="instructions to use instead of ours")
    judge.add_argument("--workers", metavar="N", type=_count, default=8, help="requests at once (default: 8)")
    judge.add_argument("--timeout", metavar="S", type=_positive, default=120.0, help="seconds that a server may be silent (default: 120)")
    judge.add_argument("--tries", metavar="N", type=_count, default=8, help="attempts a request before the run stops (default: 8)")
    judge.add_argument(
        "--wait", metavar="S", type=_positive, default=1.0, help="after a request's first failure, doubled after each (default: 1)"
    )

    cost = parser.add_argument_group("cost")
    cost.add_argument("--dry-run", action="store_true", help="say what the run would take, and do nothing")
    cost.add_argument("--rates", metavar="FILE", help="measured rounds, as `svlm bench stream --json` writes them (default: the H100's)")
    price = "of a million of the judge's tokens, in dollars or whatever (default: 1.25,10, gpt-5's when it came out)"
    cost.add_argument("--price", metavar="IN,OUT", type=_price, default=(1.25, 10.0), help=price)

    model = parser.add_argument_group("checkpoints")
    model.add_argument("--streams", metavar="N", type=_count, default=1, help="streams that run as one batch (default: 1)")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and computation (default: as the weights are stored)")
    add_mesh(model)
    model.add_argument("--save-every", metavar="ROUNDS", type=_count, default=300, help="rounds between two savings (default: 300)")
    add_stream(parser)


def add_stream(parser: argparse.ArgumentParser, seed: str = "--seed") -> None:
    """How a checkpoint watches and speaks; `seed` is what the flag of sampling's is called."""
    stream = parser.add_argument_group("stream", "what is not given is as the checkpoint's streaming.json has it, or else the default")
    defaults = StreamConfig()
    for flag, (field, kind, text) in STREAM_FLAGS.items():
        help = f"{text} (default: {getattr(defaults, field)})"
        stream.add_argument(seed if field == "seed" else flag, dest=field, type=kind, default=argparse.SUPPRESS, help=help)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of StreamConfig that flags were given for."""
    return {field: getattr(args, field) for field, _, _ in STREAM_FLAGS.values() if hasattr(args, field)}


def stream_config(args: argparse.Namespace, settings: Mapping[str, Any]) -> StreamConfig:
    """Of the flags that are given, and for the rest of a checkpoint's own settings. UsageError where they do not go together."""
    try:
        return StreamConfig(**{**settings, **given(args)})
    except UserError as error:
        raise UsageError(str(error)) from None


def needed(args: argparse.Namespace, **names: str) -> None:
    """UsageError for the first of these flags that is not given."""
    for name, why in names.items():
        if not getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is needed: {why}")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _picture(text: str) -> str:
    if not text.lower().endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png or .svg")
    return text


def _price(text: str) -> tuple[float, float]:
    parts: list[Any] = text.split(",")
    try:
        first, second = (float(part) for part in parts)
        if min(first, second) >= 0 and max(first, second) < math.inf:
            return first, second
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be two prices, such as 1.25,10")
