"""The least time of a program on a chip: its operations, bytes of memory and bytes sent, each at the maker's rate, all at once."""

import dataclasses

from svlm_jax.planning.chips import Chip


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds. The longest of the three is what no program can be faster than."""

    compute: float
    memory: float
    links: float
    mfu: float  # the model's operations, at that time, over the chip's best

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def by(self) -> str:
        """What binds."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def step_bounds(chip: Chip, operations: float, moved: float, sent: float, model_operations: float) -> Bounds:
    """Of one chip's operations, bytes of memory and bytes sent; `model_operations` are those of `operations` that are not repeated."""
    compute, memory, links = operations / chip.operations, moved / chip.memory_rate, sent / chip.link_rate
    return Bounds(compute, memory, links, model_operations / chip.operations / max(compute, memory, links))
