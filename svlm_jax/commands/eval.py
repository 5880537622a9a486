"""`svlm eval SUBJECT`: benchmarks of commentary. Each subject is a module beside this one, with a line in `SUBJECTS`."""

import argparse
import importlib
from typing import Any

SUMMARY = "compare commentaries on benchmarks: generate, merge, judge, report"
DESCRIPTION = """\
Benchmarks of commentary. A run that was stopped or killed goes on where it was when it is started again with the same arguments.
Example: svlm eval inf-streams metadata.jsonl --videos videos --a models/streamingvlm --b gpt-4o-mini.jsonl \\
           --judge https://api.openai.com/v1#gpt-5 --out runs/streamingvlm
"""
SUBJECTS = {  # name -> module, which has SUMMARY, add_arguments(parser) and run(args)
    "inf-streams": "svlm_jax.commands.eval_inf_streams",
    "livesports": "svlm_jax.commands.eval_livesports",
    "match": "svlm_jax.commands.eval_match",
}


def add_parser(subparsers: Any) -> None:
    """`eval` with its subjects."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("eval", help=SUMMARY, description=DESCRIPTION, formatter_class=shape, allow_abbrev=False)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, module in SUBJECTS.items():
        subject = importlib.import_module(module)
        made = subjects.add_parser(
            name, help=subject.SUMMARY, description=f"{subject.SUMMARY[0].upper()}{subject.SUMMARY[1:]}.", allow_abbrev=False
        )
        subject.add_arguments(made)


def run(args: argparse.Namespace) -> int:
    return importlib.import_module(SUBJECTS[args.subject]).run(args)
