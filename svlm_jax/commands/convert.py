"""`svlm convert SRC DST`: checkpoints from Hugging Face's form to Orbax's and back, or to another dtype. Without PyTorch."""

import argparse
import os
from typing import Any

from svlm_jax.commands.progress import ProgressLine

SUMMARY = "convert a checkpoint: Hugging Face to Orbax and back, or to another dtype"
DESCRIPTION = """\
Writes the checkpoint SRC as directory DST. Without --to, Hugging Face's form becomes Orbax's, and Orbax's becomes Hugging Face's;
so does a training run's (SRC is its `out`, for the last checkpoint, or `out/checkpoints/STEP`), adapters merged; with --to peft its
adapters alone are written, for PEFT.
Nothing is changed but what is asked for: there and back, every tensor is the same bit for bit. Memory does not grow with the model.
DST is written beside its place and renamed at the end, so it is whole or not there; it can be run again after an interruption.
Example: svlm convert models/streamingvlm models/streamingvlm-orbax"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert", help=SUMMARY, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint's directory, of either form, a training run's, or a name on the Hub; local or gs://")
    parser.add_argument("target", metavar="DST", help="the directory to write, which must not exist; local or gs://")
    parser.add_argument("--to", choices=("hf", "orbax", "peft"), help="the form of DST (default: the one that SRC does not have)")
    kinds = ("bfloat16", "float16", "float32", "int8", "fp8")
    parser.add_argument("--dtype", choices=kinds, help="of the tensors (default: as they are); int8 and fp8: of the decoder's and the head's weights")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format, merged into the weights on the way")
    parser.add_argument(
        "--vision-from", metavar="DIR", help="for text-only Qwen2.5 weights: the Qwen-VL checkpoint that gives the vision tower and the tokenizer"
    )
    parser.add_argument("--shard-gb", metavar="GB", type=_positive, default=5.0, help="a safetensors file's size at most (default: 5)")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    import numpy as np

    from svlm_jax.checkpoints.convert import TITLES, convert
    from svlm_jax.checkpoints.heap import keep_freed
    from svlm_jax.checkpoints.safetensors_file import FLOATS

    keep_freed()
    kinds = {kind.name: kind for kind in FLOATS.values()}
    eight = args.dtype if args.dtype in ("int8", "fp8") else None
    dtype = None if args.dtype is None or eight else np.dtype(kinds[args.dtype])
    with ProgressLine("converted") as progress:
        made = {"form": args.to, "dtype": dtype, "quantize": eight, "shard_bytes": args.shard_gb * 1e9}
        done = convert(args.source, args.target, **made, adapter=args.adapter, vision_from=args.vision_from, progress=progress)
    named = f"{done.dtype.name} and {done.quantization.kind}" if done.quantization else done.dtype.name
    print(f"{done.path}: {done.parameters:,} parameters, {done.nbytes:,} bytes of {named} in {TITLES[done.form]}")
    return 0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
