"""The decoder's layers as a dict of layers, for decoding, or as one stacked layer, for scans: from one to the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.sharding import NamedSharding, PartitionSpec

from svlm_jax.model.qwen_vl import is_stacked
from svlm_jax.types import Array, Params


def to_stacked(params: Params) -> Params:
    """The parameters with their layers stacked: leaves [L, ...], sharded as before.

    The layers' arrays in `params` are deleted as they are taken, so that no more than one stacked leaf is there twice.
    Stacked parameters come back as they are. Works under `jit` as well.
    """
    if is_stacked(params):
        return params
    layers = params["text"]["layers"]
    stacked = {}
    for name in layers[0]:
        leaves = [layers[i][name] for i in range(len(layers))]
        sharding = leaves[0].sharding if _concrete(leaves[0]) else None
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind)
        stacked[name] = _placed(lambda *parts: jnp.stack(parts), leaves, sharding)
        _delete(leaves)
    return {**params, "text": {**params["text"], "layers": stacked}}


def to_unstacked(params: Params) -> Params:
    """The parameters with one dict of arrays for each layer, sharded as before; `to_stacked` backwards.

    The stacked arrays in `params` are deleted as they are taken. A stacked axis that is sharded is gathered.
    """
    if not is_stacked(params):
        return params
    stacked = params["text"]["layers"]
    count = next(iter(stacked.values())).shape[0]
    layers: dict[int, dict[str, Array]] = {i: {} for i in range(count)}
    for name, leaf in stacked.items():
        sharding = leaf.sharding if _concrete(leaf) else None
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
        for layer, part in zip(layers.values(), _placed(list, [leaf], sharding), strict=True):
            layer[name] = part
        _delete([leaf])
    return {**params, "text": {**params["text"], "layers": layers}}


def _placed(function: Callable[..., Any], arguments: list[Array], sharding: Any) -> Any:
    """`function` of the arguments, its results put on `sharding` (anywhere, where it is None)."""
    if sharding is None:
        return function(*arguments)
    return jax.block_until_ready(jax.jit(function, out_shardings=sharding)(*arguments))


def _concrete(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, core.Tracer)


def _delete(arrays: list[Any]) -> None:
    for array in arrays:
        if _concrete(array):
            array.delete()
