"""`svlm bench stream`: what a round costs on this machine. The work, and what it imports, is in `svlm_jax.bench`."""

import argparse

DESCRIPTION = """\
Measures rounds in steady state, end to end and stage by stage, beside the least time that the device's own speed allows.
Example: svlm bench stream --model 7b --weights bf16 --rounds 100 --json bench.json
A soak of the whole loop on any machine: svlm bench stream --model tiny --height 112 --width 112 --rounds 20000
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """`bench` with its one subject, `stream`."""
    parser = subparsers.add_parser("bench", help="measure the speed on this machine", description="Measures the speed on this machine.")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    stream = subjects.add_parser(
        "stream", help="the streaming loop", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    from svlm_jax.bench.stream import add_arguments

    add_arguments(stream)
    return parser


def run(args: argparse.Namespace) -> int:
    from svlm_jax.bench import stream

    return stream.run(args)
