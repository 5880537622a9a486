"""`svlm eval livesports`. The work is in `svlm_jax.evaluation`."""

import argparse

from svlm_jax.commands import UsageError
from svlm_jax.commands.eval_flags import add_sides, needed, stream_config

SUMMARY = "LiveSports-3K-CC: short events, compared with what a human said"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("events", metavar="FILE", help="LiveSports-3K-CC.json, or rows of its form")
    add_sides(parser)


def run(args: argparse.Namespace) -> int:
    if not args.dry_run:
        needed(args, a="a contestant", out="a folder for the run")
    if args.judge and not args.b and not args.dry_run:
        raise UsageError("--judge needs --b, whom --a is compared with")
    stream_config(args, {})  # looks whether the flags go together
    from svlm_jax.evaluation.livesports_run import run as work

    return work(args)
