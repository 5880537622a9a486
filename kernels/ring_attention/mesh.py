"""A kernel over a mesh: each device attends with its own streams and its own heads, and nothing is communicated.

A compiler that spreads a program over devices does not look into kernels: without this it would gather the cache.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

STREAMS, HEADS = "data", "tensor"  # the mesh axes that cut streams, and key-value heads with the queries of their group


def over_mesh(call: Callable, q, k, v, valid, self_k=None, self_v=None, self_valid=None, *, plan=None, **static):
    """`call` of a backend, on whatever mesh the operands lie (`jax.jit` notes it with them). An axis that does not divide stays whole."""
    mesh = jax.typeof(jax.tree.leaves(k)[0]).sharding.mesh
    # Axes that are manual already are the caller's
    axes = {name: mesh.shape[name] for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if all(size == 1 for size in axes.values()):
        return call(q, k, v, valid, self_k, self_v, self_valid, plan=plan, **static)

    def cut(axis: str, size: int) -> str | None:
        return axis if axis in axes and size % axes[axis] == 0 else None

    streams, heads = cut(STREAMS, k.shape[0]), cut(HEADS, k.shape[1])
    whole, cached, queries = PartitionSpec(streams), PartitionSpec(streams, heads), PartitionSpec(streams, None, heads)
    fresh = (cached, cached, whole) if self_k is not None else (None, None, None)
    specs = (PartitionSpec(streams, None, None, heads), cached, cached, whole, *fresh, jax.tree.map(lambda _: whole, plan))

    def local(*arrays):
        *operands, local_plan = arrays
        return call(*operands, plan=local_plan, **static)

    run = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=(queries, queries), axis_names=set(axes), check_vma=False)
    return run(local)(q, k, v, valid, self_k, self_v, self_valid, plan)
