"""Compiles the streaming programs for TPUs that are not here, and writes down what they would take of their memory.

    pip install -e . libtpu && python benchmarks/aot.py --out benchmarks/tpu_aot.json
    python benchmarks/aot.py --out benchmarks/tpu_aot.json --keep --topology v5e:2x2 --chip        these rows alone; the others stay

Needs no accelerator: the compiler is in the libtpu package. The full 7B model in bfloat16, one stream of 720p video at the
defaults, on one v6e chip and cut by heads over the four chips of a v5e and of a v5p host, and its decoding with weights, or keys and
values, in eight bits; then the attention kernel alone, for one chip of every kind. About half an hour on two cores. Every row names its
commit: that of the file is the newest.

All bytes are those of one chip. `bytes_accessed` is the compiler's estimate (of the kernel, what the kernel states); of a loop, as
in `decode`, it counts one step. `least_bytes` and `least_operations` are what `svlm_jax.bench.floors` counts of the same work, the
whole cache valid. `temp_bytes` is what a program needs besides its arguments and results; results that alias the donated state take
no room of their own.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler for TPUs is asked for by name, and no device of that kind is wanted
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor is the cloud's metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor is there a chip that two processes could fight for

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from svlm_jax.bench import floors
from svlm_jax.bench.report import commit
from svlm_jax.config import KeysValues, ModelConfig, StreamConfig
from svlm_jax.configs.models import MODELS
from svlm_jax.kernels.ring_attention.api import ring_attention
from svlm_jax.kernels.ring_attention.int8 import Int8Rows
from svlm_jax.model.quantized import KINDS, Quantization
from svlm_jax.planning.serving import PROGRAMS, lower_program, stream_spec
from svlm_jax.sharding import make_mesh
from svlm_jax.streaming.layout import StreamSpec

# name -> (how libtpu is asked for it, mesh axes)
TOPOLOGIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "v6e:1x1": ({"topology_name": "v6e:1x1", "chips_per_host_bounds": (1, 1, 1)}, {}),
    "v5e:2x2": ({"topology_name": "v5e:2x2"}, {"tensor": 4}),
    "v5p:2x2x1": ({"topology_name": "v5p:2x2x1"}, {"tensor": 4}),
}
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")  # the kernel is compiled for one of each
KERNELS = [(1, 1), (1, 8), (20, 1), (768, 1), (768, 8)]  # new tokens, streams
SLOTS = (2048, 65_536)
WEIGHTS = {"bf16": None, "int8": Quantization("int8"), "fp8": Quantization("fp8")}
KV: tuple[KeysValues | None, ...] = (None, "int8")
EIGHT_BITS = (
    ("bf16", None),
    ("int8", None),
    ("fp8", None),
    ("bf16", "int8"),
)  # weights, keys and values: of decoding; the first of all else
NAMES = ("topology", "program", "chip", "slots", "tokens", "streams", "weights", "kv")  # by which a row is known


def topology_mesh(name: str) -> Mesh:
    """The mesh of one of TOPOLOGIES, of devices that can be compiled for and nothing else."""
    asked, axes = TOPOLOGIES[name]
    return make_mesh(**axes, devices=topologies.get_topology_desc(platform="tpu", **asked).devices)


def compile_program(
    spec: StreamSpec, name: str, mesh: Mesh, dtype: Any = jnp.bfloat16, quantization: Quantization | None = None
) -> jax.stages.Compiled:
    """One program, with the state donated, for the devices of a mesh."""
    return lower_program(spec, name, mesh, dtype, quantization=quantization).compile()


def measure(compiled: jax.stages.Compiled) -> dict[str, int]:
    """A compiled program's bytes on one device."""
    memory = compiled.memory_analysis()
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "bytes_accessed": int(compiled.cost_analysis()["bytes accessed"]),
    }


def least(spec: StreamSpec, name: str, weights: str, chips: int) -> dict[str, int]:
    """The work of one chip by our own count, for the programs that have a floor: every slot is held and attended to."""
    eight = WEIGHTS[weights]
    weight_dtype = None if eight is None else KINDS[eight.kind][0]
    slots = spec.cache.slots
    work = {
        "decode": [floors.decode_work(spec, 1, slots, jnp.bfloat16, weight_dtype)],
        "ingest": [floors.vision_work(spec, 1, jnp.bfloat16), floors.prefill_work(spec, 1, slots, jnp.bfloat16, weight_dtype)],
    }.get(name, [])
    sums = {"least_bytes": sum(w.bytes for w in work), "least_operations": sum(w.operations for w in work)}
    return {key: round(value / chips) for key, value in sums.items() if value}


def compile_kernel(topology: str, *, slots: int, tokens: int, streams: int, kv: KeysValues | None = None) -> jax.stages.Compiled:
    """Ring attention at the 7B model's heads, for one chip."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    cache, fresh = (shape((streams, 4, rows, 128), jnp.bfloat16) for rows in (slots, tokens))
    if kv == "int8":
        cache = Int8Rows(shape(cache.shape, jnp.int8), shape(cache.shape[:3], jnp.float32))
    regions = ((0, 640), (640, 1152), (1152, slots))
    query, bits = shape((streams, 3, tokens, 28, 128), jnp.bfloat16), functools.partial(shape, dtype=jnp.bool_)
    call = jax.jit(functools.partial(ring_attention, regions=regions, backend="mosaic_tpu"))
    return call.lower(query, cache, cache, bits((streams, slots)), self_k=fresh, self_v=fresh, self_valid=bits((streams, tokens))).compile()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", choices=MODELS)
    parser.add_argument("--topology", nargs="*", choices=TOPOLOGIES, default=list(TOPOLOGIES), help="of the programs; all by default")
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="all by default")
    parser.add_argument("--chip", nargs="*", choices=CHIPS, default=list(CHIPS), help="of the kernel; all by default")
    parser.add_argument("--kv", nargs="+", choices=("off", "int8"), default=["off", "int8"], help="keys and values; both by default")
    parser.add_argument("--layers", type=int, help="decoder layers and vision blocks, to try this out; all by default")
    parser.add_argument("--keep", action="store_true", help="rows of --out that are not made anew stay")
    parser.add_argument("--out", type=Path, help="a JSON file, written anew after every program")
    options = parser.parse_args(argv)
    model = MODELS[options.model]()
    if options.layers is not None:
        model = cut(model, options.layers, options.layers)
    specs = {kv: stream_spec(model, StreamConfig(kv=kv)) for kv in KV}
    spec = specs[None]
    asked = [kv for kv in KV if (kv or "off") in options.kv]
    packages = ("jax", "jaxlib", "libtpu", "flax")
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "model": options.model,
        "dtype": "bfloat16",
        "decoder_layers": model.text.num_hidden_layers,
        "vision_blocks": model.vision.depth,
        "streams": 1,
        "frame": [spec.height, spec.width],
        "slots": spec.cache.slots,
        "programs": [],
        "kernels": [],
    }
    if options.keep and options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        for kind in ("programs", "kernels"):
            result[kind] = [{**row, "commit": row.get("commit", before["commit"]), "kv": row.get("kv", "bf16")} for row in before[kind]]

    def note(kind: str, row: dict[str, Any]) -> None:
        row["commit"] = result["commit"]
        print(json.dumps(row), flush=True)
        known = [row.get(name) for name in NAMES]
        result[kind] = [other for other in result[kind] if [other.get(name) for name in NAMES] != known] + [row]
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")

    for topology, name in itertools.product(options.topology, options.program):
        mesh = topology_mesh(topology)
        for weights, kv in EIGHT_BITS if name == "decode" else EIGHT_BITS[:1]:
            if kv not in asked:
                continue
            start = time.perf_counter()
            compiled = compile_program(specs[kv], name, mesh, quantization=WEIGHTS[weights])
            found = measure(compiled) | least(specs[kv], name, weights, mesh.size)
            seconds = round(time.perf_counter() - start, 1)
            note("programs", {"topology": topology, "program": name, "weights": weights, "kv": kv or "bf16", **found, "compile_s": seconds})
    for chip, slots, (tokens, streams), kv in itertools.product(options.chip, SLOTS, KERNELS, asked):
        start = time.perf_counter()
        found = measure(compile_kernel(chip, slots=slots, tokens=tokens, streams=streams, kv=kv))
        del found["alias_bytes"]
        seconds = round(time.perf_counter() - start, 1)
        sizes = {"chip": chip, "slots": slots, "tokens": tokens, "streams": streams}
        note("kernels", {**sizes, "kv": kv or "bf16", **found, "compile_s": seconds})


def cut(model: ModelConfig, layers: int, blocks: int) -> ModelConfig:
    """The same widths, fewer layers; the last vision block attends to the whole frame."""
    text = dataclasses.replace(model.text, num_hidden_layers=layers)
    vision = dataclasses.replace(model.vision, depth=blocks, fullatt_block_indexes=(blocks - 1,))
    return dataclasses.replace(model, text=text, vision=vision)


if __name__ == "__main__":
    main()
