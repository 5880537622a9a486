"""A checkpoint of 7B size to Orbax and back: is every bit the same, how much memory does it take, how fast is it beside `cp`?

    python benchmarks/convert_7b.py --scratch DIR [--model 7b] [--json FILE]

Writes random bfloat16 weights of the named size into DIR in files of 5 GB (as `svlm convert` has them), copies them with `cp`, and
converts them with `svlm convert` in processes whose peak memory is read from the kernel. Each of the three finds nothing of what it reads in the
system's cache. About three times the model's size is needed on DIR's disk; what was written is removed again.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from svlm_jax.checkpoints.hub_config import write_config
from svlm_jax.checkpoints.names import name_table
from svlm_jax.checkpoints.plan import leaves, tensors_of
from svlm_jax.checkpoints.safetensors_file import Mapped
from svlm_jax.checkpoints.save import write_json, write_weights
from svlm_jax.checkpoints.staging import Staging
from svlm_jax.config import ModelConfig
from svlm_jax.configs.models import MODELS
from svlm_jax.model.qwen_vl import abstract_params

GB = 1e9
SHARD_BYTES = 5e9
# As `svlm convert` does, in a process of its own, whose peak is the conversion's; the interpreter's is taken once JAX and Orbax have started
MEASURED = """
import json, sys, time
from pathlib import Path
import jax
from svlm_jax.checkpoints import orbax_form
from svlm_jax.checkpoints.convert import convert
from svlm_jax.checkpoints.heap import keep_freed
keep_freed()
orbax_form.library()
jax.block_until_ready(jax.numpy.zeros(8))
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
began = time.perf_counter()
done = convert(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "interpreter_bytes": before, "peak_bytes": peak(), "bytes": done.nbytes}))
"""


def write_random(folder: Path, config: ModelConfig) -> int:
    """A checkpoint of random weights; gives its bytes. No number is infinite or NaN."""
    import ml_dtypes

    shapes = {path: leaf.shape for path, leaf in leaves(abstract_params(config))}
    rng = np.random.Generator(np.random.SFC64(0))
    held: dict = {}

    def draw(path):
        if path not in held:
            held.clear()
            size = math.prod(shapes[path])
            bits = rng.integers(0, 1 << 64, -(-size // 4), dtype=np.uint64).view(np.uint16)[:size]
            bits &= np.uint16(0xBFFF)  # exponents below 2: finite, and every mantissa
            held[path] = bits.view(ml_dtypes.bfloat16).reshape(shapes[path])
        return held[path]

    folder.mkdir(parents=True)
    write_weights(draw, config, Staging(folder), np.dtype(ml_dtypes.bfloat16), shard_bytes=SHARD_BYTES)
    write_json(folder / "config.json", write_config(config))
    return sum(math.prod(piece.source_shape) for piece in name_table(config)) * 2


def forget(folder: Path) -> None:
    """Takes the files out of the system's cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def converted(source: Path, target: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", MEASURED, str(source), str(target)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def same_bits(one: Path, two: Path) -> tuple[bool, int]:
    """Whether every tensor of two checkpoints has the same dtype, shape and bytes under the same name; and how many there are."""
    a, b, files = tensors_of(one), tensors_of(two), Mapped()
    same = a.keys() == b.keys()
    for name in a.keys() & b.keys():
        left, right = a[name], b[name]
        same = same and (left.dtype, left.shape) == (right.dtype, right.shape)
        same = same and np.array_equal(files.tensor(left), files.tensor(right))
        files.release(left)
        files.release(right)
    return same, len(a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on the disk to measure, which is made")
    parser.add_argument("--model", choices=[*MODELS], default="7b")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    scratch, config = arguments.scratch, MODELS[arguments.model]()
    if scratch.exists():
        parser.error(f"{scratch} is there already: name a folder that is not, since it is removed in the end")
    scratch.mkdir(parents=True)
    try:
        size = write_random(scratch / "hf", config)
        files = sorted(file.stat().st_size for file in (scratch / "hf").glob("*.safetensors"))
        print(f"{arguments.model}: {size / GB:.1f} GB in {len(files)} files, the largest {files[-1] / GB:.2f} GB", flush=True)
        forget(scratch / "hf")
        there = converted(scratch / "hf", scratch / "orbax")
        print(f"to Orbax: {there}", flush=True)
        forget(scratch / "hf")
        copy = timed(["cp", "-r", str(scratch / "hf"), str(scratch / "copy")])
        print(f"cp: {copy:.1f} s", flush=True)
        shutil.rmtree(scratch / "copy")
        forget(scratch / "orbax")
        back = converted(scratch / "orbax", scratch / "back")
        print(f"and back: {back}", flush=True)
        shutil.rmtree(scratch / "orbax")
        same, tensors = same_bits(scratch / "hf", scratch / "back")
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
            "model": config.name,
            "bytes": size,
            "files": len(files),
            "tensors": tensors,
            "bit_identical": same,
            "cp_mb_per_s": round(size / copy / 1e6),
            "to_orbax_mb_per_s": round(size / there["seconds"] / 1e6),
            "to_hf_mb_per_s": round(size / back["seconds"] / 1e6),
            "to_orbax_of_cp": round(copy / there["seconds"], 2),
            "to_hf_of_cp": round(copy / back["seconds"], 2),
            "to_orbax_gb_above_interpreter": round((there["peak_bytes"] - there["interpreter_bytes"]) / GB, 2),
            "to_hf_gb_above_interpreter": round((back["peak_bytes"] - back["interpreter_bytes"]) / GB, 2),
        }
    finally:
        shutil.rmtree(scratch)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if report["bit_identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
