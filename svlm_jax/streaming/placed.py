"""An engine on a mesh: streams are cut along `data`, heads along `tensor`, and every array of its programs has one place for ever.

Streams that do not divide by `data` are whole on all of its devices, which then do the same work.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from svlm_jax.errors import UserError
from svlm_jax.sharding import Rules, state_shardings
from svlm_jax.streaming.evict import evict
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.rows import read_row, write_row
from svlm_jax.streaming.shards import row_of
from svlm_jax.streaming.state import StreamState, init_state, state_shapes
from svlm_jax.streaming.step import DECODE_OPTIONS, INGEST_OPTIONS, close_stream, decode, ingest, open_stream


def mesh_of(arrays: Any) -> Mesh | None:
    """The mesh that a tree of arrays (or shapes with their shardings) lies on; None where that is one device."""
    for leaf in jax.tree.leaves(arrays):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def check_streams(mesh: Mesh | AbstractMesh | None, streams: int) -> None:
    """UserError where the streams of a batch cannot be shared out evenly."""
    copies = 1 if mesh is None else mesh.shape["data"]
    if streams % copies:
        raise UserError(f"{streams} streams do not divide by data = {copies}: make --streams a multiple of {copies}, or data smaller")


def rows_sharding(mesh: Mesh, streams: int) -> NamedSharding:
    """Of an array with one row a stream."""
    axis = Rules().streams
    return NamedSharding(mesh, PartitionSpec(axis if axis is not None and streams % mesh.shape[axis] == 0 else None))


def new_state(spec: StreamSpec, streams: int, dtype: Any, mesh: Mesh | None) -> StreamState:
    """`init_state`, each device allocating its own part."""
    if mesh is None:
        return init_state(spec, streams, dtype)
    place = state_shardings(state_shapes(spec, streams, dtype), mesh)
    return jax.jit(lambda: init_state(spec, streams, dtype), out_shardings=place)()


@functools.lru_cache(maxsize=8)
def programs_on(mesh: Mesh, spec: StreamSpec, streams: int) -> Mapping[str, Callable]:
    """The programs of an engine by name, as `step.compiled` and `rows` have them, for arrays on a mesh. Parameters lie where they are."""
    state, one = (state_shardings(state_shapes(spec, count), mesh) for count in (streams, 1))
    rows, whole = rows_sharding(mesh, streams), NamedSharding(mesh, PartitionSpec())
    placed = functools.partial(jax.jit, donate_argnames="state")
    return {
        "ingest": placed(
            ingest, in_shardings=(None, state, rows, rows, rows), out_shardings=(state, whole), compiler_options=INGEST_OPTIONS
        ),
        "decode": placed(decode, in_shardings=(None, state, rows), out_shardings=(state, whole), compiler_options=DECODE_OPTIONS),
        "evict": placed(evict, in_shardings=(state,), out_shardings=state),
        "open_stream": placed(open_stream, in_shardings=(None, state, whole, whole, whole), out_shardings=state),
        "close_stream": placed(close_stream, in_shardings=(state, whole), out_shardings=state),
        "read_row": jax.jit(row_of if rows.spec[0] else read_row, in_shardings=(state, whole), out_shardings=one),
        "write_row": placed(write_row, in_shardings=(state, one, whole, whole), out_shardings=state),
    }
