"""`svlm eval match`. The work is in `svlm_jax.evaluation`."""

import argparse
from typing import Any, get_args

from svlm_jax.commands import UsageError
from svlm_jax.commands.flags import _count_or_off, _number
from svlm_jax.config import Mode, Positions, StreamConfig
from svlm_jax.errors import UserError

SUMMARY = "simulated matches: commentary against what really happened, without a judge"
STREAM_FLAGS: dict[str, tuple[str, Any, str]] = {  # flag -> (field of StreamConfig, type or choices, help)
    "--mode": ("mode", get_args(Mode), "what is remembered"),
    "--positions": ("positions", get_args(Positions), "of what is left when older rounds leave"),
    "--vision-window": ("vision_window", int, "rounds of video that are remembered"),
    "--text-window": ("text_window", int, "rounds whose words are remembered in their place"),
    "--text-sink": ("text_sink", _count_or_off, "first tokens of older words that are kept, or off"),
    "--text-sliding": ("text_sliding", _count_or_off, "last tokens of older words that are kept, or off"),
    "--temperature": ("temperature", _number, "of sampling"),
    "--sampling-seed": ("seed", int, "of sampling"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", metavar="M", type=float, default=10.0, help="of the match (default: 10)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="which match; the bundled model has seen those from 1000 on (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a model's directory (default: the bundled one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and computation (default: as the weights are stored)")
    parser.add_argument("--baseline", choices=("truth", "blind"), help="instead of a model: what is right, or what is right of another match")
    parser.add_argument("--question-every", metavar="SECONDS", type=float, default=30.0, help="on average; 0: none is asked (default: 30)")
    parser.add_argument("--json", metavar="FILE", help="also write the measures, the settings and the machine here")
    parser.add_argument("--captions", metavar="FILE.jsonl", help="also write what was said, and what should have been")
    parser.add_argument("--plot", metavar="FILE", help="also draw the measures over the match into this .png or .svg (needs matplotlib)")
    parser.add_argument("--video", metavar="FILE.mp4", help="film the match into this file, or use it if it is there (default: a temporary one)")
    group = parser.add_argument_group("stream", "what is not given is as the model's streaming.json has it")
    for flag, (field, kind, text) in STREAM_FLAGS.items():
        dest = "sampling_seed" if flag == "--sampling-seed" else field
        how: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, help=text, **how)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.minutes <= 24 * 60 or args.question_every < 0 or not 0 <= args.seed < 2**32:
        raise UsageError("--minutes must be more than 0 and at most 1440, --question-every and --seed not negative")
    names = {"sampling_seed": "seed"}
    fields = [dest for dest in (*(field for field, _, _ in STREAM_FLAGS.values() if field != "seed"), "sampling_seed") if hasattr(args, dest)]
    settings = {names.get(dest, dest): getattr(args, dest) for dest in fields}
    try:
        StreamConfig(**settings)
    except UserError as error:
        raise UsageError(str(error)) from None
    from svlm_jax.evaluation.match_run import run as work

    return work(args, settings)
