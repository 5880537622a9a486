"""How long a model takes from nothing to its first caption, the first time and the second, beside reading its files.

    python benchmarks/second_start.py --scratch DIR [--model 7b] [--json FILE]

Writes random bfloat16 weights of the named size into DIR, unless they are there, reads them through once, and captions the sample clip in
two processes one after the other, which share a cache of compiled programs that is empty before the first. A process's time is from its
start to its first caption. What else was read of those files before is in the system's memory for all three; DIR is left as it is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert_7b import write_random

from svlm_jax.bench.report import surroundings, write_json
from svlm_jax.configs.models import MODELS
from svlm_jax.demo.make_tiny import tiny_path

BLOCK = 1 << 24
CHILD = """
import json, sys, time
import jax
from svlm_jax.api import Commentary
from svlm_jax.demo.clip import sample_path
from svlm_jax.programs import use_compilation_cache
use_compilation_cache()
said = next(iter(Commentary(sample_path(), sys.argv[1], duration=2)))
print(json.dumps({"seconds": time.time() - float(sys.argv[2]), "tokens": len(said.tokens), "device": jax.devices()[0].device_kind}))
"""


def checkpoint(folder: Path, model: str) -> Path:
    """A directory with weights, config and the tiny model's tokenizer, whose ids every vocabulary has."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        write_random(part, MODELS[model]())
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_path() / file, part)
        part.rename(folder)
    return folder


def seconds_to_read(folder: Path) -> float:
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(BLOCK):
                pass
    return time.perf_counter() - start


def start(folder: Path, environment: dict[str, str]) -> dict:
    """One process, from its start to its first caption."""
    command = [sys.executable, "-c", CHILD, str(folder), str(time.time())]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(scratch: Path, model: str) -> dict:
    environment = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is the children's
    scratch.mkdir(parents=True, exist_ok=True)
    folder = checkpoint(scratch / f"start-{model}", model)
    read = seconds_to_read(folder)
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
        first, second = start(folder, environment), start(folder, environment)
    assert first["tokens"] and second["tokens"]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    times = {"read_seconds": read, "first_start_seconds": first["seconds"], "second_start_seconds": second["seconds"]}
    return {**surroundings(), "device": second["device"], "model": model, "weight_bytes": size, **times}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--scratch", type=Path, required=True, help="a folder, which is made, on the disk that the weights are read from")
    flags.add_argument("--model", choices=[*MODELS], default="7b")
    flags.add_argument("--json", type=Path, help="write the result")
    return flags


def main() -> int:
    arguments = parser().parse_args()
    found = measure(arguments.scratch, arguments.model)
    print(
        f"{found['model']}, {found['weight_bytes'] / 1e9:.2f} GB on {found['device']}: read in {found['read_seconds']:.1f} s, first caption "
        f"{found['first_start_seconds']:.1f} s after the first start and {found['second_start_seconds']:.1f} s after the second"
    )
    if arguments.json:
        write_json(arguments.json, [found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
