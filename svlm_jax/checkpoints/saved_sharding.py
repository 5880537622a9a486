"""How the arrays of an Orbax checkpoint were cut over devices when they were saved, which its metadata tells. Reading asks nothing of it."""

from collections import Counter
from collections.abc import Iterable
from typing import Any


def saved_sharding(arrays: Iterable[Any]) -> str:
    """In words, of the metadata of every array: the meshes, and how many arrays are cut by which of their axes.

    What was written from the host's memory, as `svlm convert` writes, has none.
    """
    meshes: Counter[str] = Counter()
    specs: Counter[str] = Counter()
    for array in arrays:
        told: Any = getattr(array, "sharding_metadata", None) or getattr(array, "sharding", None)
        if getattr(told, "partition_spec", None) is None:
            specs["whole"] += 1
            continue
        meshes[" x ".join(f"{axis} {size}" for axis, size in zip(told.axis_names, told.shape, strict=True) if size > 1) or "one device"] += 1
        specs[_spec(told.partition_spec)] += 1
    if not meshes:
        return "saved whole, by no mesh"
    counts = ", ".join(f"{count} {spec}" for spec, count in specs.most_common())
    return f"saved on {' and '.join(f'a mesh of {mesh}' if mesh != 'one device' else mesh for mesh in meshes)}: {counts}"


def _spec(spec: Iterable[Any]) -> str:
    """One array's axes: the mesh axes that cut each, `-` for an axis that is whole."""
    axes = ["-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in spec]
    return "whole" if all(axis == "-" for axis in axes) else f"cut ({', '.join(axes)})"
