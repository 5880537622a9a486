"""Accelerators by the names that people give them, and what their makers publish of them."""

import dataclasses
import math
import re

from svlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Rates are the maker's, per second."""

    name: str
    title: str  # as JAX calls its kind
    platform: str  # "tpu" or "cuda"
    operations: float  # dense bfloat16
    memory: int  # bytes
    memory_rate: float  # bytes
    link_rate: float  # bytes that leave it over all its links to other chips (ICI, NVLink); half of what is published for both ways
    axes: int  # of its torus
    source: str

    @property
    def usable(self) -> int:
        """Bytes that a program can have. Of a GPU 95%, with XLA_PYTHON_CLIENT_MEM_FRACTION=.95 (by default JAX takes 75%)."""
        return round(0.95 * self.memory) if self.platform == "cuda" else self.memory


_TPU = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", "tpu", 197e12, 16 << 30, 819e9, 200e9, 2, _TPU + "v5e"),
        Chip("v5p", "TPU v5", "tpu", 459e12, 95 << 30, 2765e9, 600e9, 3, _TPU + "v5p"),
        Chip("v6e", "TPU v6 lite", "tpu", 918e12, 32 << 30, 1638e9, 400e9, 2, _TPU + "v6e"),
        Chip("h100", "NVIDIA H100 SXM", "cuda", 989e12, 80 * 10**9, 3350e9, 450e9, 1, "https://www.nvidia.com/en-us/data-center/h100/"),
    )
}
ALIASES = {"v5litepod": "v5e", "tpu v5e": "v5e", "tpu v5p": "v5p", "tpu v6e": "v6e", "trillium": "v6e"}
CORES = {"v5p": 2}  # that Google counts in the number behind the name: v5p-128 has 64 chips
# Numbers of chips that slices come in, and their shapes
SHAPES = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {
        4: (2, 2, 1),
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
        512: (8, 8, 8),
        1024: (8, 8, 16),
    },
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are wired to each other."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        shape = "" if self.chip.platform == "cuda" else f", {' x '.join(map(str, self.shape))}"
        return f"{self.count} {self.chip.name} chip{'s' * (self.count > 1)}{shape}"


def parse_topology(text: str) -> Topology:
    """Of `v5e:16x16`, `v5e-256`, `v5litepod-256`, `v5p-128` (cores, as Google counts them), `v6e-64`, `h100:8`. UserError for other names."""
    found = re.fullmatch(r"([a-z0-9 ]+?)\s*[:-]\s*(\d+(?:x\d+)*)", text.strip().lower())
    name = found[1] if found else text
    chip = CHIPS.get(ALIASES.get(name, name))
    if found is None or chip is None:
        raise UserError(
            f"topology {text!r} is unknown: write {', '.join(CHIPS)} with a shape or a number, such as v5e:16x16, v5p-128 or h100:8"
        )
    sizes: tuple[int, ...] = tuple(int(size) for size in found[2].split("x"))
    if min(sizes) < 1:
        raise UserError(f"topology {text!r} has no chips: all its sizes must be at least 1")
    if chip.platform == "cuda":
        if found[2].count("x") or sizes[0] > 8:
            raise UserError(f"topology {text!r} is unknown: one host of {chip.name}s is planned for, {chip.name}:1 to {chip.name}:8")
        return Topology(chip, sizes)
    shapes = SHAPES[chip.axes]
    if not found[2].count("x"):
        cores = CORES.get(chip.name, 1) if text.strip().lower().count("-") else 1
        shape = shapes.get(sizes[0] // cores) if sizes[0] % cores == 0 else None
        if shape is None:
            known = ", ".join(f"{chip.name}-{count * CORES.get(chip.name, 1)}" for count in shapes)
            raise UserError(f"topology {text!r} is no slice that there is: {known}, or a shape such as {_shape_text(chip, shapes)}")
        return Topology(chip, shape)
    if len(sizes) != chip.axes:
        raise UserError(f"topology {text!r}: {chip.name} chips are wired in {chip.axes} axes, such as {_shape_text(chip, shapes)}")
    return Topology(chip, sizes)


def _shape_text(chip: Chip, shapes: dict[int, tuple[int, ...]]) -> str:
    return f"{chip.name}:{'x'.join(map(str, shapes[64]))}"
