"""`svlm inspect PATH`: what a checkpoint is. Nothing large is read."""

import argparse
import os
from typing import Any

SUMMARY = "say what a checkpoint is: family, sizes, dtypes, files"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("inspect", help=SUMMARY, description=f"{SUMMARY.capitalize()}. Nothing large is read.", allow_abbrev=False)
    parser.add_argument("path", metavar="PATH", help="a checkpoint's directory, of Hugging Face's or Orbax's form, or a name on the Hub; local or gs://")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from svlm_jax.checkpoints.inspect import described, inspect

    found = inspect(args.path)
    print(found.path)
    for what, text in described(found):
        print(f"  {what:<11} {text}")
    return 0
