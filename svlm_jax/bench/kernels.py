"""`svlm bench kernels`: at the 7B model's sizes, ring attention, each backend of this machine beside XLA's products and cuDNN, and the
products of a decoding step with weights in eight bits, beside XLA's with the same weights and with bfloat16.

Every backend is compared with the reference in float32 before it is timed. A size's floor is the longer of its bytes over the
device's copies and its operations over the device's matrix products, both measured in this run.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from svlm_jax.bench.ceilings import Ceilings
from svlm_jax.bench.ceilings import measure as measure_ceilings
from svlm_jax.bench.floors import Work
from svlm_jax.bench.report import surroundings, write_json
from svlm_jax.errors import UserError
from svlm_jax.kernels.bench import measure
from svlm_jax.kernels.products.bench import KINDS, WEIGHTS
from svlm_jax.kernels.products.bench import measure as measure_product

SINK, WORDS = 640, 1152  # where the first two regions of the default windows end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that take several values make a row for every combination."""
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[2048, 15_360, 65_536], help=f"of the cache, multiples of 128 above {WORDS}"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 768], help="new ones")
    parser.add_argument("--streams", type=int, nargs="+", default=[1], help="streams in one batch")
    parser.add_argument(
        "--kv", nargs="+", choices=("off", "int8"), default=["off"], help="the cache as computed, or in 8 bits (default: off)"
    )
    parser.add_argument("--layers", type=int, default=8, help="caches that a program cycles through, so that none stays in fast memory")
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[1, 8], help="also products of so many rows with weights of 8 bits; none: no products"
    )
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="of which weights (default: all)")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=["int8", "fp8"], help="kept as (default: int8 and fp8)")
    parser.add_argument("--json", metavar="FILE", help="write the results: an object, or a list of several")


def run(args: argparse.Namespace) -> int:
    """Every combination of the flags, each row as it comes."""
    for name in ("tokens", "streams", "rows"):
        if min(getattr(args, name), default=1) < 1:
            raise UserError(f"--{name} must be at least 1, not {min(getattr(args, name))}")
    if args.layers < 1:
        raise UserError(f"--layers must be at least 1, not {args.layers}")
    for slots in args.slots:
        if slots % 128 or slots <= WORDS:
            raise UserError(f"--slots must be a multiple of 128 above {WORDS}, not {slots}")
    ceilings = measure_ceilings(fp8=bool(args.rows) and "fp8_products" in args.kind)
    print(f"ceilings: copy {ceilings.copy_tbps:.3g} TB/s, matrix product {ceilings.matmul_tflops:.4g} TFLOP/s", file=sys.stderr, flush=True)
    results: list[dict[str, Any]] = []
    title = ""
    for record in _measured(args):
        results.append(surroundings() | {"ceilings": dataclasses.asdict(ceilings)} | rated(record, ceilings))
        if heading(record) != title:
            title = heading(record)
            print(f"{title}  {'backend':<12}{'us':>10}{'TB/s':>8}{'TFLOP/s':>9}{'of floor':>10}{'error':>10}")
        print("\n".join(rows(results[-1])), flush=True)
        if args.json:
            write_json(args.json, results)
    return 0


def _measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for every combination of the flags, as it comes."""
    for slots, tokens, streams, kv in itertools.product(args.slots, args.tokens, args.streams, args.kv):
        regions = ((0, SINK), (SINK, WORDS), (WORDS, slots))
        yield measure(streams=streams, tokens=tokens, regions=regions, layers=args.layers, kv=None if kv == "off" else kv)
    for weight, rows, kind in itertools.product(args.weights if args.rows else (), args.rows, args.kind):
        yield measure_product(weight, rows=rows, kind=kind)


COLUMNS = {"slots": 7, "tokens": 8, "streams": 9, "kv": 10}  # of attention, with their widths
PRODUCT_COLUMNS = {"weight": 8, "rows": 6, "inputs": 8, "outputs": 9, "kind": 14}


def columns(record: dict[str, Any]) -> dict[str, int]:
    return PRODUCT_COLUMNS if "weight" in record else COLUMNS


def heading(record: dict[str, Any]) -> str:
    return "".join(f"{name:>{width}}" for name, width in columns(record).items())


def rated(record: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """A record of `measure` or `measure_product` with every time also as rates, and as the floor's share of it."""
    operations = record["operations"]
    work = Work(record["bytes"], 0.0, operations) if record.get("narrow") else Work(record["bytes"], operations)
    floor = 1e3 * work.milliseconds(ceilings)

    def rates(found: Any) -> Any:
        if not isinstance(found, dict) or "us" not in found:
            return found
        us, moved = found["us"], found.get("bytes", work.bytes)
        return found | {"tbps": moved / us / 1e6, "tflops": operations / us / 1e6, "of_floor": floor / us}

    return {name: rates(found) for name, found in record.items()} | {"floor_us": floor}


def rows(record: dict[str, Any]) -> list[str]:
    """A line for every backend."""
    lines = []
    for name, found in record.items():
        if not isinstance(found, dict) or not found.keys() & {"us", "unsupported"}:
            continue
        start = "".join(f"{record[key]:>{width}}" for key, width in columns(record).items())
        start += f"  {'XLA' if name == 'reference' else name:<12}"
        if "unsupported" in found:
            lines.append(start + found["unsupported"])
            continue
        error = f"{found['relative_error']:>10.1e}" if "relative_error" in found else f"{'':>10}"
        lines.append(start + f"{found['us']:>10.1f}{found['tbps']:>8.3f}{found['tflops']:>9.1f}{100 * found['of_floor']:>9.0f}%{error}")
    return lines
