"""Devices that can be compiled for and nothing else, and what the compiler says of a program for them."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from importlib import resources
from typing import Any

from svlm_jax.errors import UserError
from svlm_jax.planning.chips import Topology

SETTINGS = {  # for the environment, before JAX is imported
    "JAX_PLATFORMS": "cpu",  # the compiler of another platform is asked for by name, and no device of its kind is wanted
    "TPU_SKIP_MDS_QUERY": "1",  # nor is the cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor is there a chip that two processes could fight for
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Where there is no GPU nothing can be timed: products are cuBLAS's, as its heuristics choose them
OPTIONS = {"cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "": 1}
_AMOUNT = r"([\d.]+)\s*([KMGT]i?B?|)\b"


class DoesNotFit(Exception):
    """The program needs more memory than a chip has."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"needs {needed} of {available} bytes")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    arguments: int
    results: int  # that are not written over the arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporaries + self.code


def prepare() -> None:
    """Sets the environment; to be called before JAX is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def devices(topology: Topology) -> list[Any]:
    """Devices of a topology. UserError where its compiler is not installed."""
    import jax
    from jax.experimental import topologies

    if topology.chip.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("the compiler for TPUs is not installed: pip install libtpu")
        hosts = {"chips_per_host_bounds": (1, 1, 1)} if topology.count == 1 else {}
        with _without_remarks():
            try:
                return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **hosts).devices)
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                reason = next(iter(str(error).splitlines()), "")
                raise UserError(f"there is no topology {topology.name} for the compiler ({reason}): try another shape") from error
    if not any(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "jax_cuda12_plugin")):
        raise UserError('the compiler for NVIDIA GPUs is not installed: pip install "jax[cuda13]" (no GPU and no driver is needed)')
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # JAX asks the devices that are here; those that are compiled for have compute capability 9.0
    cudnn.check_compute_capability = lambda capability: tuple(map(int, capability.split("."))) <= (9, 0)
    target = resources.files("svlm_jax.planning").joinpath(f"{topology.chip.name}.txtpb").read_text()
    return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{topology.count}").devices)


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """The library of TPUs writes to standard error, from C++, that there is none here."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def compiled(lowered: Any, platform: str) -> Any:
    """The program for devices of a chip's platform. DoesNotFit where the compiler finds no room; UserError where it refuses otherwise."""
    import jax

    try:
        return lowered.compile(compiler_options=OPTIONS.get(platform))
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found:
            raise DoesNotFit(*found) from error
        raise UserError(f"the compiler refuses this program: {next(iter(str(error).splitlines()), '')}") from error


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there are) as a compiler's message has them; None where it speaks of something else."""
    patterns = (
        rf"\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)",
        rf"Used {_AMOUNT} of {_AMOUNT} hbm",
    )
    for pattern in patterns:
        if found := re.search(pattern, message, re.IGNORECASE):
            needed, unit, there, there_unit = found.groups()
            return round(float(needed) * UNITS[unit]), round(float(there) * UNITS[there_unit])
    return None


def memory(program: Any) -> Memory:
    """Of a compiled program."""
    m = program.memory_analysis()
    return Memory(
        m.argument_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes, m.temp_size_in_bytes, m.generated_code_size_in_bytes
    )
