"""Whether an engine fits into memory, and its programs compiled ahead, in threads, while weights and frames are read."""

import contextlib
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.sharding import state_shardings
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.placed import mesh_of, programs_on
from svlm_jax.streaming.state import prompt_shapes, slot_bytes, state_shapes
from svlm_jax.streaming.step import compiled
from svlm_jax.types import Params

GIB = 1 << 30
Kind = bool  # whether a round comes with the query


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes that arrays, or their shapes, take of the memory that `free_memory` looks at: each device's part, or all parts where devices share one."""
    return sum(math.prod(_part(leaf)) * _copies(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> tuple[int, ...]:
    """The shape of what one device holds."""
    return leaf.sharding.shard_shape(leaf.shape) if isinstance(getattr(leaf, "sharding", None), NamedSharding) else leaf.shape


def _copies(leaf: Any) -> int:
    """How many parts lie in one memory: those of a host's virtual devices do."""
    mesh = mesh_of(leaf)
    return mesh.size if mesh is not None and mesh.devices.flat[0].platform == "cpu" else 1


def free_memory(device: Any = None) -> int | None:
    """Bytes that can still be allocated on a device (the default one); None where it cannot be known."""
    device = device or jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" where it has none
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    if not free:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=None)


def check_memory(spec: StreamSpec, weight_bytes: int, dtype: Any, *, streams: int = 1, mesh: Mesh | None = None) -> None:
    """Raises UserError, with nothing allocated, where weights yet to be loaded (`device_bytes`) and the streams' state exceed what is free."""
    free = free_memory()
    if free is None:
        return
    # A lower bound first: the layout of an absurd window would itself be too much for the host.
    rounds = {"full": spec.stream.capacity_rounds}.get(spec.stream.mode, spec.stream.vision_window)
    words = spec.stream.text_window * spec.stream.max_new_tokens if spec.stream.mode in ("streaming", "recompute") else 0
    words += spec.stream.text_capacity if spec.stream.text_sliding is None else (spec.stream.text_sink or 0) + spec.stream.text_sliding
    state = streams * slot_bytes(spec, dtype) * (rounds * math.prod(spec.grid) + words) // (1 if mesh is None else mesh.size)
    if weight_bytes + state <= free:
        shapes = state_shapes(spec, streams, dtype)
        state = device_bytes(shapes if mesh is None else jax.tree.map(_cut, shapes, state_shardings(shapes, mesh)))
    if weight_bytes + state <= free:
        return
    parts = f"weights {size_text(weight_bytes)}, cache {size_text(state)}" if weight_bytes else f"cache {size_text(state)}"
    have = f"{size_text(free)} of memory free on {jax.local_devices()[0].device_kind}"
    raise UserError(
        f"this run needs {size_text(weight_bytes + state)} ({parts}), with {have}: {_way_out(spec.stream, weight_bytes > free)}"
    )


def _cut(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def size_text(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / (1 << 20):.1f} MiB"


def _way_out(stream: StreamConfig, weights_alone: bool) -> str:
    if weights_alone:
        return "use a smaller model, or --dtype bfloat16 if it is not that already"
    flags = ["--capacity-rounds"] if stream.mode == "full" else ["--vision-window"]
    if stream.mode in ("streaming", "recompute"):
        flags.append("--text-window")
    flags += ["--max-new-tokens", "--max-pixels", "--fps", "--text-capacity" if stream.text_sliding is None else "--text-sink and --text-sliding"]
    smaller = "" if stream.kv else "keep keys and values in 8 bits (--kv int8), or "
    return f"{smaller}lower {', '.join(flags[:-1])} or {flags[-1]}"


class Programs:
    """Compiles what an engine will call. A call of the engine then finds its program in JAX's own cache."""

    def __init__(self, spec: StreamSpec, params: Params, dtype: Any, kinds: list[Kind], *, streams: int = 1):
        """`params` may be shapes, with their shardings on a mesh. `kinds` are the rounds to come, the first one first: programs start in this order."""
        mesh = mesh_of(params)
        programs = compiled if mesh is None else programs_on(mesh, spec, streams)
        state, i32 = state_shapes(spec, streams, dtype), np.dtype(np.int32)
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), streams))
        frames = _shape((streams, spec.stream.frames_per_round, 3, spec.height, spec.width), np.dtype(np.uint8))
        words = _shape((spec.cache.words_capacity,), i32)
        params = jax.tree.map(_like, params)
        calls: dict[Any, tuple] = {kinds[0]: ("ingest", params, state, frames, prompt_shapes(spec, streams, query=kinds[0]), key)}
        calls["open_stream"] = ("open_stream", params, state, _shape((), i32), words, _shape((), i32))
        calls["decode"] = ("decode", params, state, key)
        for kind in kinds[1:]:
            calls.setdefault(kind, ("ingest", params, state, frames, prompt_shapes(spec, streams, query=kind), key))
        # No more at once than there are cores: the first caption waits for the first three alone
        self._pool = ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1), "compile")
        self._futures: dict[Any, Future] = {name: self._pool.submit(_compile, programs[call[0]], *call[1:]) for name, call in calls.items()}

    def ready(self, name: Any) -> bool:
        """Whether `wait` would return at once."""
        return name not in self._futures or self._futures[name].done()

    def wait(self, *names: Any) -> None:
        """Until "open_stream", "decode" or the `ingest` of a kind is ready."""
        for name in names:
            if name in self._futures:
                self._futures[name].result()

    def check_memory(self, *names: Any) -> None:
        """UserError where what a compiled program works with, beside what is allocated by now, exceeds what is free."""
        free = free_memory()
        for name in names:
            analysis = self._futures[name].result().memory_analysis()
            if free is not None and analysis is not None and analysis.temp_size_in_bytes > free:
                need, have = size_text(analysis.temp_size_in_bytes), size_text(free)
                raise UserError(f"a round needs {need} to work with, and {have} of memory are free: lower --chunk, --fps or --max-pixels")

    def close(self) -> None:
        """Drops what has not begun to compile."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile(program: Any, *arguments: Any) -> Any:
    return program.lower(*arguments).compile()


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    """As a call with this array will look; where the array is pinned to its devices, the program is too."""
    pinned = leaf.sharding if not isinstance(leaf, jax.Array) or leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=pinned)


def use_compilation_cache(on: bool = True) -> Path | None:
    """Has JAX keep compiled programs on disk, for the next start; gives the folder, None where it can't be used.

    The folder is $JAX_COMPILATION_CACHE_DIR, or svlm-jax in the user's cache directory (freedesktop.org's XDG base directories).
    """
    jax.config.update("jax_enable_compilation_cache", on)
    if not on:
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else "~/.cache"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(base, "svlm-jax", "xla"))
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs add up to seconds
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
