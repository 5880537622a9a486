"""`svlm plan CONFIG --topology v5e:16x16`: what a run takes of chips that are not here. The work is in `svlm_jax.planning`."""

import argparse
from collections.abc import Sequence
from typing import Any

DESCRIPTION = """\
Compiles the training step of a run, as train.py would run it, for chips that are not here, on this CPU, and says whether it fits,
what is sent between chips and how long a step takes at least. CONFIG is a preset of configs/ or a Python file; --serve plans the
programs of a stream instead, and takes the name of a model too. Needs `pip install libtpu` for TPUs, "jax[cuda13]" for H100s.
Example: svlm plan stage1_7b_v5e_256 --topology v5e:16x16 remat=full
"""


VALUED = ("--topology", "--mesh", "--json", "--streams", "--kv")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say what a run takes of TPUs or GPUs that are not here",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a preset, a Python file, or with --serve the name of a model (3b, 7b, 32b, 72b)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change, as for train.py")
    where = "v5e:16x16, v5e-256, v5p-128 (cores: 64 chips), v6e-64, h100:8 (default: that of the preset)"
    parser.add_argument("--topology", metavar="NAME", help=where)
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="data, fsdp, sequence, tensor; one may be -1 (default: that of the preset)")
    parser.add_argument("--json", metavar="FILE", help="also write what was found as an object")
    parser.add_argument("--serve", action="store_true", help="the programs of a stream (open_stream, ingest, decode, evict) instead of a training step")
    parser.add_argument("--streams", metavar="N", type=int, default=1, help="with --serve: streams at once (default: 1)")
    parser.add_argument("--kv", choices=("int8",), help="with --serve: keys and values in 8 bits")
    parse = parser.parse_known_args
    parser.parse_known_args = lambda args=None, namespace=None: parse(_flags_first(args), namespace)  # type: ignore[method-assign]


def _flags_first(words: Sequence[str] | None) -> list[str] | None:
    """Settings may stand anywhere; argparse takes all words without dashes as one run, and the first run only."""
    if words is None:
        return None
    flags, rest, value = [], [], False
    for word in words:
        (flags if value or word.startswith("-") else rest).append(word)
        value = not value and word in VALUED
    return flags + rest


def run(args: argparse.Namespace) -> int:
    from svlm_jax.planning import compiling

    compiling.prepare()
    from svlm_jax.planning.run import run

    return run(args)
