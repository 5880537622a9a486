"""Processes that train together: their start, a table of who is there, and checks that fail at once where they are not as asked."""

import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from svlm_jax.data.batch import Batch
from svlm_jax.errors import UserError
from svlm_jax.training.config import HostsConfig
from svlm_jax.training.placement import ROWS, Placement


def start(config: HostsConfig) -> None:
    """Joins the other processes. To be called before anything asks for devices. UserError where they are not those asked for."""
    if config.count > 1:
        told: dict[str, Any] = {}
        if config.coordinator:
            if config.index is None:
                raise UserError("hosts.coordinator is given without hosts.index: say which process this is, from 0")
            told = {"coordinator_address": config.coordinator, "num_processes": config.count, "process_id": config.index}
        # JAX's own timeout ends the program in C++, with a stack and no word on what to do
        watch = threading.Timer(config.timeout, _give_up, (config,))
        watch.daemon = True
        watch.start()
        try:
            jax.distributed.initialize(**told, initialization_timeout=config.timeout + 60)
        except (RuntimeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(f"{config.count} processes could not be joined ({reason}): see hosts.coordinator and hosts.index") from error
        finally:
            watch.cancel()
    if jax.process_count() != config.count:
        raise UserError(f"hosts.count = {config.count}, but {jax.process_count()} processes are here: start as many as asked, or ask for these")


def _give_up(config: HostsConfig) -> None:
    sys.stderr.write(f"svlm: {config.count} processes did not find each other within {config.timeout} s: start all of them, or set hosts.count\n")
    sys.stderr.flush()
    os._exit(1)


def table() -> str:
    """Processes and their devices, a line each."""
    devices: dict[int, list[Any]] = {}
    for device in jax.devices():
        devices.setdefault(device.process_index, []).append(device)
    counts = {len(each) for each in devices.values()}
    if len(counts) > 1:
        text = ", ".join(f"process {index} has {len(each)}" for index, each in devices.items())
        raise UserError(f"processes have unlike numbers of devices ({text}): look for one that failed to start")
    lines = ["process  devices  kind"]
    for index, each in devices.items():
        mine = "  (this one)" if index == jax.process_index() and len(devices) > 1 else ""
        lines.append(f"{index:7}  {len(each):7}  {each[0].device_kind}{mine}")
    return "\n".join(lines)


def loaders(mesh: Mesh) -> list[tuple[set[int], list[int]]]:
    """(processes, row shards) of each part of a batch: processes whose devices hold the same rows load the same ones.

    On a pod a process's rows need not be neighbours: a mesh follows the wires, not the hosts. UserError where two processes share
    some of their rows only, or have unlike numbers of them.
    """
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts: dict[tuple[int, ...], set[int]] = {}
    for process, rows in sorted(held.items()):
        parts.setdefault(tuple(sorted(rows)), set()).add(process)
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    if sum(map(len, parts)) != count or len({len(rows) for rows in parts}) != 1:
        raise UserError(
            f"data x fsdp = {count} is not shared evenly by {len(held)} processes: choose a power of two for each axis of the mesh, "
            "and let sequence and tensor divide the devices of one process or be a multiple of them"
        )
    return [(processes, list(rows)) for rows, processes in parts.items()]


def _own(mesh: Mesh) -> tuple[int, list[tuple[set[int], list[int]]]]:
    parts = loaders(mesh)
    return next(i for i, (processes, _) in enumerate(parts) if jax.process_index() in processes), parts


def shard(mesh: Mesh) -> tuple[int, int]:
    """(this process's part of every batch, parts) as the data pipeline shares rows. UserError as `loaders`."""
    index, parts = _own(mesh)
    return index, len(parts)


def copies(mesh: Mesh) -> int:
    """Processes that load the same rows as this one, itself counted."""
    index, parts = _own(mesh)
    return len(parts[index][0])


def row_numbers(mesh: Mesh, rows: int) -> list[int]:
    """Where in the batch each of this process's `rows` rows is."""
    index, parts = _own(mesh)
    shards = parts[index][1]
    each = rows // len(shards)
    return [row * each + i for row in shards for i in range(each)]


def put(batch: Batch, placement: Placement) -> Batch:
    """This process's rows, on its devices, as a part of the batch of all processes."""
    count = shard(placement.mesh)[1] if jax.process_count() > 1 else 1  # type: ignore[arg-type]
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0] * count, *a.shape[1:]), a.dtype), batch)
    shardings = placement.batch(whole)
    return jax.tree.map(
        lambda a, like, sharding: jax.make_array_from_process_local_data(sharding, np.asarray(a), like.shape), batch, whole, shardings
    )


def own_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is cut over rows alone, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


class Ending:
    """Whether to end: of several processes, whether any was told to. All ask in the same order, and get the same answer each time.

    Args:
      heard: whether this process was told to; of several, JAX's preemption service hears SIGTERM itself.
    """

    def __init__(self, heard: Callable[[], bool]):
        self._heard, self._asked, self._told = heard, 0, False

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._heard()
        from jax.experimental import multihost_utils

        # The service says yes once, at the number behind the highest that any process has asked with, from 0 at its start:
        # with the steps of a run that goes on, what is heard before the first of them would be behind all that come
        self._asked += 1
        self._told = self._told or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._told


def gathered(value: Any) -> list[Any]:
    """What each process has, in their order; what JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def total(number: float) -> float:
    """The sum over all processes."""
    return totals(number)[0]


def totals(*numbers: float) -> list[float]:
    """The sum of each number over all processes, in float64."""
    if jax.process_count() == 1:
        return [float(number) for number in numbers]
    from jax.experimental import multihost_utils

    halves = np.asarray(numbers, np.float64).view(np.uint32)  # JAX would round float64
    return multihost_utils.process_allgather(halves).view(np.float64).sum(axis=0).tolist()


def later_totals(numbers: Sequence[float], placement: Placement) -> Callable[[], list[float]]:
    """What gives the sum of each number over all processes, in float32.

    It is computed in the devices' order, before what is asked of them afterwards: who looks at it once that is done does not wait.
    """
    if jax.process_count() == 1:
        found = [float(number) for number in numbers]
        return lambda: found
    own = np.zeros((placement.row_shards // jax.process_count(), len(numbers)), np.float32)
    own[0] = numbers
    whole = _summed(placement.sharding())(jax.make_array_from_process_local_data(placement.sharding(ROWS), own))
    return lambda: np.asarray(whole.addressable_data(0)).tolist()


@functools.cache
def _summed(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda rows: rows.sum(axis=0), out_shardings=whole)
