"""Work that streams and heads do each by themselves, done by each device with its own: nothing is sent.

A compiler that spreads a program over devices does not see that a row picked by a computed index is on one of them, and would gather the
whole cache for it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from svlm_jax.sharding import Rules, state_shardings
from svlm_jax.streaming.state import StreamState
from svlm_jax.types import Array, Int


def on_shards(work: Callable[[StreamState], StreamState], state: StreamState) -> StreamState:
    """`work(state)`, on whatever mesh the state lies (`jax.jit` notes it with its arrays)."""
    mesh = jax.typeof(state.valid).sharding.mesh
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if all(mesh.shape[name] == 1 for name in axes):
        return work(state)
    specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings(state, mesh))
    return jax.shard_map(work, mesh=mesh, in_specs=(specs,), out_specs=specs, axis_names=axes, check_vma=False)(state)


def row_of(state: StreamState, row: Int[Array, ""]) -> StreamState:
    """`rows.read_row` where streams are cut over devices: the one that has the row hands it to all."""
    mesh, axis = jax.typeof(state.valid).sharding.mesh, Rules().streams
    assert axis is not None
    specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings(state, mesh))
    whole = jax.tree.map(
        lambda spec: PartitionSpec(None, *spec[1:]) if spec else spec, specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )

    def local(state: StreamState, row: Array) -> StreamState:
        here = row - jax.lax.axis_index(axis) * state.age.shape[0]
        mine = (here >= 0) & (here < state.age.shape[0])

        def shared(x: Array) -> Array:
            if not x.ndim:
                return x
            one = jax.lax.dynamic_slice_in_dim(x, jnp.where(mine, here, 0), 1)
            if x.dtype == jnp.bool_:
                return jax.lax.psum((one & mine).astype(jnp.int8), axis).astype(jnp.bool_)
            nothing = jnp.asarray(-0.0 if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)  # 0 + -0 would lose the sign
            return jax.lax.psum(jnp.where(mine, one, nothing), axis)

        return jax.tree.map(shared, state)

    return jax.shard_map(local, mesh=mesh, in_specs=(specs, PartitionSpec()), out_specs=whole, check_vma=False)(state, row)
