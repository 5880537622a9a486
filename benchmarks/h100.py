"""Everything that is measured on one GPU for the 7B model's sizes, in commands of a given length, one after another.

    python benchmarks/h100.py --minutes 8.5
    python benchmarks/h100.py --minutes 8.5 --case rounds_int8_weights kernels_attention

Cases come in the order below, each in a process of its own, as `svlm bench` or a script beside this one would run it. None begins that would
not end in time, by the seconds that are expected of it, and none goes on after it; what the record holds of this commit is not measured again,
so the same command goes on where it was stopped. The record is benchmarks/h100_cases.json: {case: what was written with --json}. Programs
are kept in JAX's cache on disk.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svlm_jax.bench.report import commit

RECORD = Path(__file__).with_name("h100_cases.json")
STREAM = ("stream", "--model", "7b", "--rounds", "60", "--pipelined-rounds", "10", "--profile-rounds", "4")
PREFILLED = ("--weights", "qkv", "out", "gate_up", "down")
# name -> seconds to be expected, arguments of `svlm bench`; or a script of this folder, and its own
CASES: dict[str, tuple[float, tuple[str, ...]]] = {
    "rounds": (100, STREAM),
    "rounds_8_streams": (140, (*STREAM, "--streams", "8")),
    "kernels_attention": (
        90,
        ("kernels", "--slots", "12288", "49152", "--tokens", "1", "--streams", "1", "8", "--kv", "off", "int8", "--layers", "28", "--rows"),
    ),
    "kernels_prefill": (40, ("kernels", "--slots", "12544", "--tokens", "768", "--kv", "off", "int8", "--rows")),
    "kernels_products": (90, ("kernels", "--slots", "1280", "--tokens", "1", "--rows", "1", "8", "32")),
    "kernels_products_prefill": (
        90,
        ("kernels", "--slots", "1280", "--tokens", "1", "--rows", "768", "--kind", "int8", "fp8", "fp8_products", *PREFILLED),
    ),
    "rounds_int8_weights": (100, (*STREAM, "--weights", "int8")),
    "rounds_fp8_weights": (100, (*STREAM, "--weights", "fp8")),
    "rounds_fp8_products": (100, (*STREAM, "--weights", "fp8_products")),
    "rounds_8_fps_int8_kv": (130, (*STREAM, "--fps", "8", "--kv", "int8")),
    "rounds_8_fps": (130, (*STREAM, "--fps", "8")),
    "rounds_int8_kv": (100, (*STREAM, "--kv", "int8")),
    "rounds_int8_weights_8_streams": (140, (*STREAM, "--weights", "int8", "--streams", "8")),
    "second_start": (300, ("second_start.py", "--scratch", ".")),
    "soak": (260, (*STREAM, "--rounds", "1200")),
    "figure": (400, ("stream", "--model", "7b", "--rounds", "300", "--plot", str(RECORD.with_name("h100_figure.png")))),
}


def measured(record: dict[str, Any], name: str, now: str) -> bool:
    """Whether the record has this case, of this commit."""
    return now != "unknown" and bool(record.get(name)) and all(row["commit"] == now for row in record[name])


def run(name: str, seconds: float) -> list[dict[str, Any]]:
    """One case; nothing where it fails or takes longer than `seconds`, and its own words on standard error say why."""
    _, arguments = CASES[name]
    with tempfile.TemporaryDirectory(prefix="svlm-bench-") as folder:
        out = Path(folder) / "out.json"
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path("~/.cache/svlm-jax/xla").expanduser())
        script = arguments[0].endswith(".py")
        program = [str(RECORD.with_name(arguments[0])), *arguments[1:]] if script else ["-m", "svlm_jax.cli", "bench", *arguments]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        case = subprocess.Popen([sys.executable, *program, "--json", str(out)], cwd=folder, env=environment, start_new_session=True)
        try:
            failed = f"exit status {case.returncode}" if case.wait(seconds) else ""
        except subprocess.TimeoutExpired:
            failed = f"not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(case.pid, signal.SIGKILL)  # what it started would keep the GPU
            case.wait()
        if failed:
            print(f"{name}: {failed}", file=sys.stderr, flush=True)
            return []
        found = json.loads(out.read_text())
        return found if isinstance(found, list) else [found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="until no more case is begun that may not end (default: 8.5)")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="in this order (default: all that are missing)")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record, which is added to (default: benchmarks/h100_cases.json)")
    args = parser.parse_args(argv)
    end, now = time.monotonic() + 60 * args.minutes, commit()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    left: list[str] = []
    for name in args.case:
        expected, rest = CASES[name][0], end - time.monotonic()
        if measured(record, name, now):
            continue
        if expected > rest:
            left.append(name)
            continue
        print(f"== {name}, with {rest:.0f} s left", file=sys.stderr, flush=True)
        found = run(name, rest)
        if not found:
            left.append(name)
            continue
        record[name] = found
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(part, args.out)
    print(f"{len(record)} of {len(CASES)} cases are in {args.out}" + (f"; not yet measured: {', '.join(left)}" if left else ""))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
