"""`svlm eval inf-streams`. The work is in `svlm_jax.evaluation`."""

import argparse

from svlm_jax.commands import UsageError
from svlm_jax.commands.eval_flags import add_sides, needed, stream_config
from svlm_jax.commands.flags import _not_negative, _positive

SUMMARY = "Inf-Streams-Eval: games of hours, judged in segments of 100 seconds"
CHUNKS = (25.0, 500.0)  # seconds that a chunk may have, as published


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metadata", nargs="?", metavar="FILE", help="rows of video, title and content, as published")
    add_sides(parser)
    what = parser.add_argument_group("benchmark")
    what.add_argument(
        "--segments", metavar="FILE", help="rows of the segments that are judged, as published (default: cut from the metadata)"
    )
    what.add_argument(
        "--start", metavar="S", type=_not_negative, default=1000.0, help="where in each game to begin (default: 1000, as published)"
    )
    what.add_argument(
        "--segment", metavar="S", type=_positive, default=100.0, help="seconds that are judged at once (default: 100, as published)"
    )
    what.add_argument(
        "--min-words", metavar="N", type=_words, default=200, help="words of the reference in a segment, at least (default: 200)"
    )
    what.add_argument("--chunk-seconds", metavar="S", type=_positive, help="begin anew after so much video, 25 to 500 s (default: endless)")
    fair = "what a server is shown: fair: the checkpoint's frames, rate and history; published: what GPT-4o mini had (default: fair)"
    what.add_argument("--setting", choices=("fair", "published"), default="fair", help=fair)


def _words(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number")
    return int(text)


def run(args: argparse.Namespace) -> int:
    if args.chunk_seconds is not None and not CHUNKS[0] <= args.chunk_seconds <= CHUNKS[1]:
        raise UsageError(
            f"--chunk-seconds must be {CHUNKS[0]:g} to {CHUNKS[1]:g}, not {args.chunk_seconds:g}; leave it out for an endless stream"
        )
    if not args.dry_run:
        if args.metadata is None:
            raise UsageError("FILE is needed: the benchmark's rows of video, title and content")
        needed(args, a="a contestant", out="a folder for the run")
    if args.judge and not args.b and not args.dry_run:
        raise UsageError("--judge needs --b, whom --a is compared with")
    stream_config(args, {})  # looks whether the flags go together
    from svlm_jax.evaluation.inf_streams_run import run as work

    return work(args)
