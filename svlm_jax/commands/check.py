"""`svlm check PATH`: is every tensor there and every number finite; and is it the same as another checkpoint."""

import argparse
import os
from typing import Any

from svlm_jax.commands.progress import ProgressLine

SUMMARY = "check a checkpoint, by itself or against another"
DESCRIPTION = """\
Every tensor must be there, once, of the right shape, and every number finite. With --against, every bit must be that of another checkpoint
too, and where PyTorch and transformers are installed, the logits here must be those of the other one there (float32, within 1e-3)."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check", help=SUMMARY, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint's directory, of Hugging Face's or Orbax's form, or a name on the Hub; local or gs://")
    parser.add_argument("--against", metavar="HF_DIR", help="another checkpoint, which must be the same")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from svlm_jax.checkpoints.check import check, compare, compare_logits
    from svlm_jax.checkpoints.load import find
    from svlm_jax.checkpoints.orbax_form import is_orbax
    from svlm_jax.checkpoints.run_form import is_run
    from svlm_jax.storage import is_remote

    with ProgressLine("checked") as progress:
        _, count = check(args.path, progress=progress)
    print(f"{args.path}: every tensor is there, and all {count:,} numbers are finite")
    if args.against is None:
        return 0
    with ProgressLine("compared") as progress:
        same = compare(args.path, args.against, progress=progress)
    print(f"all {same:,} numbers are those of {args.against}, bit for bit")
    against = find(args.against)[0]
    if is_orbax(against) or is_run(against) or is_remote(against):
        print("logits were not compared: transformers reads Hugging Face's form alone, and no buckets")
        return 0
    worst = compare_logits(args.path, args.against)
    print("logits were not compared: PyTorch is not installed" if worst is None else f"logits differ from transformers' by {worst:.1e} at most")
    return 0
