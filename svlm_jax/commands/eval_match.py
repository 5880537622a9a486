"""`svlm eval match`. The work is in `svlm_jax.evaluation`."""

import argparse

from svlm_jax.commands import UsageError
from svlm_jax.commands.eval_flags import add_stream, given, stream_config
from svlm_jax.commands.flags import add_mesh

SUMMARY = "simulated matches: commentary against what really happened, without a judge"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", metavar="M", type=float, default=10.0, help="of the match (default: 10)")
    which = "which match; those from 1000 on are for training (default: 0)"
    parser.add_argument("--seed", dest="match_seed", metavar="N", type=int, default=0, help=which)
    parser.add_argument("--matches", metavar="N", type=int, default=1, help="so many, of this and the next seeds, as one batch (default: 1)")
    parser.add_argument("--model", metavar="DIR", help="a model's directory (default: the bundled one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and computation (default: as the weights are stored)")
    add_mesh(parser)
    parser.add_argument("--baseline", choices=("truth", "blind"), help="instead of a model: what is right, or what is right of another match")
    parser.add_argument("--question-every", metavar="SECONDS", type=float, default=30.0, help="on average; 0: none is asked (default: 30)")
    parser.add_argument("--json", metavar="FILE", help="also write the measures, the settings and the machine here")
    parser.add_argument("--captions", metavar="FILE.jsonl", help="also write what was said, and what should have been")
    parser.add_argument("--plot", metavar="FILE", help="also draw the measures over the match into this .png or .svg (needs matplotlib)")
    parser.add_argument("--video", metavar="PATH", help="the film: made if it is not there; with --matches a folder (default: a temporary one)")
    add_stream(parser, seed="--sampling-seed")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.minutes <= 24 * 60 or args.question_every < 0 or not 0 <= args.match_seed < 2**32:
        raise UsageError("--minutes must be more than 0 and at most 1440, --question-every and --seed not negative")
    if not 1 <= args.matches <= 64:
        raise UsageError("--matches must be from 1 to 64")
    stream_config(args, {})  # looks whether they go together
    from svlm_jax.evaluation.match_run import run as work

    return work(args, given(args))
