"""Where arrays live on many devices: one mesh, one table from logical axes to mesh axes, and nothing in the model itself.

    data       copies of the model, each with its own streams or samples
    fsdp       parameters cut along the width, gathered when they are used (ZeRO-3, arXiv 1910.02054)
    sequence   one sequence cut into stretches
    tensor     heads, MLP and vocabulary cut, activations summed (arXiv 1909.08053); innermost, as it talks the most

An axis that does not divide by its mesh axis is replicated: with 4 key-value heads on 8 tensor shards, every shard holds
all query, key, value and output weights of attention, while MLP and vocabulary stay cut. `replicated_axes` lists such cases.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params, logical_axes
from svlm_jax.types import Params

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
Axes = Sequence[str | None]  # logical names, one an axis of the array


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axis that cuts each logical axis; None keeps it whole."""

    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    kv_heads: str | None = "tensor"
    heads: str | None = "tensor"  # of the vision tower
    mlp: str | None = "tensor"
    head_dim: str | None = None
    norm: str | None = None  # norms and biases along the width: too small to cut
    patch: str | None = None  # numbers of a flattened patch
    layers: str | None = None  # of a stacked layer; a scan over a cut axis would gather all of it
    streams: str | None = "data"

    def mesh_axis(self, logical: str | None) -> str | None:
        """The mesh axis of one logical axis."""
        return None if logical is None else getattr(self, logical)


def make_mesh(*, data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these sizes over the first devices (all of 1: a mesh of one device). GSPMD fills in what code leaves open.

    Raises UserError where there are too few devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1:
            raise UserError(f"mesh axis {axis} must be at least 1, not {size}")
    devices = jax.devices() if devices is None else list(devices)
    count = math.prod(sizes.values())
    if count > len(devices):
        text = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        more = ""
        if devices and getattr(devices[0], "platform", "") == "cpu":
            more = f", or have the CPU stand for {count} with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise UserError(f"a mesh of {text} needs {count} devices, and there are {len(devices)}: make one of its axes smaller{more}")
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return Mesh(_arranged(shape, devices[:count]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices [data, fsdp, sequence, tensor] so that neighbours on an axis are neighbours on the wires. Slices of TPUs are copies along data.

    A mesh axis may cut an axis of the wires in two (data 2 x fsdp 32 on 4x4x4), which is slower there, and never impossible.
    """
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"{slices} slices are joined along data, and data = {shape[0]}: make it a multiple of {slices}")
    inner = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)


def partition(shape: Sequence[int], axes: Axes, mesh: Mesh | AbstractMesh, rules: Rules) -> PartitionSpec:
    """How an array of `shape` with logical `axes` is cut. An axis that its mesh axis does not divide stays whole.

    Raises UserError where the rules name an axis that the mesh lacks, or cut two axes of the array by one mesh axis.
    """
    named = [rules.mesh_axis(axis) for axis in axes]
    used = [axis for axis in named if axis is not None]
    for axis in used:
        if axis not in mesh.shape:
            raise UserError(f"the sharding rules name mesh axis {axis!r}, but the mesh has {', '.join(map(str, mesh.axis_names))}")
        if used.count(axis) > 1:
            raise UserError(f"the sharding rules cut two axes of {tuple(axes)} by mesh axis {axis!r}: give one of them None")
    return PartitionSpec(
        *(axis if axis is not None and size % mesh.shape[axis] == 0 else None for axis, size in zip(named, shape, strict=True))
    )


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh, *, rules: Rules | None = None, stacked: bool = False) -> Params:
    """The sharding of every parameter, as a tree like the parameters."""
    table = rules or Rules()

    def place(leaf: jax.ShapeDtypeStruct, axes: Axes) -> NamedSharding:
        return NamedSharding(mesh, partition(leaf.shape, axes, mesh, table))

    return jax.tree.map(place, abstract_params(config, stacked=stacked), logical_axes(config, stacked=stacked))


def replicated_axes(config: ModelConfig, mesh: Mesh | AbstractMesh, *, rules: Rules | None = None) -> list[str]:
    """What stays whole although the rules cut it, one line each: `kv_heads: 4 is not a multiple of tensor = 8`."""
    table, lines = rules or Rules(), {}

    def look(leaf: jax.ShapeDtypeStruct, axes: Axes) -> None:
        for size, logical, cut in zip(leaf.shape, axes, partition(leaf.shape, axes, mesh, table), strict=True):
            axis = table.mesh_axis(logical)
            if axis is not None and cut is None:
                lines[f"{logical}: {size} is not a multiple of {axis} = {mesh.shape[axis]}"] = None

    jax.tree.map(look, abstract_params(config), logical_axes(config))
    return list(lines)


def state_shardings(state_shapes: Any, mesh: Mesh | AbstractMesh, *, rules: Rules | None = None) -> Any:
    """The sharding of every array of a `streaming.state.StreamState` (or of its shapes), as a state of shardings.

    Keys and values [B, K, S, H] are cut by stream and by key-value head, and so are their scales where they are kept in eight bits;
    all else [B, ...] is cut by stream; scalars are replicated.
    """
    table = rules or Rules()

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        heads = "kv_heads" if path[0].name in ("k", "v", "closing") else None
        axes = ("streams", heads, None, None)[: len(leaf.shape)]
        return NamedSharding(mesh, partition(leaf.shape, axes, mesh, table))

    return jax.tree_util.tree_map_with_path(place, state_shapes)
