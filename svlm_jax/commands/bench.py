"""`svlm bench`: what rounds and kernels cost on this machine. The work, and what it imports, is in `svlm_jax.bench`."""

import argparse
import importlib

STREAM = """\
Measures rounds in steady state, end to end and stage by stage, beside the least time that the device's own speed allows.
Example: svlm bench stream --model 7b --weights bf16 --rounds 100 --json bench.json
Latency and memory over stream time in all four modes: svlm bench stream --model 7b --rounds 600 --plot figure.png --json figure.json
A soak of the whole loop on any machine: svlm bench stream --model tiny --height 112 --width 112 --rounds 20000
"""
KERNELS = """\
Measures ring attention, each backend of this machine, and cuDNN where there is one, and products with weights in 8 bits beside XLA's:
correct first, then time, as rates and as the share of the least time that the device's own speed allows.
Example: svlm bench kernels --slots 15360 65536 --tokens 1 768 --kv off int8 --rows 1 8 --json kernels.json
"""
SUBJECTS = {"stream": ("the streaming loop", STREAM), "kernels": ("the kernels", KERNELS)}


def add_parser(subparsers) -> argparse.ArgumentParser:
    """`bench` with its subjects."""
    parser = subparsers.add_parser("bench", help="measure the speed on this machine", description="Measures the speed on this machine.")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (title, description) in SUBJECTS.items():
        subject = subjects.add_parser(name, help=title, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        importlib.import_module(f"svlm_jax.bench.{name}").add_arguments(subject)
    return parser


def run(args: argparse.Namespace) -> int:
    return importlib.import_module(f"svlm_jax.bench.{args.subject}").run(args)
