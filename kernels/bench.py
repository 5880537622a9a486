"""Measures ring attention on this machine's accelerator: correct first, then time, beside XLA and cuDNN in the same run.

`svlm bench kernels` puts it beside what the device can do.

A program cycles through the caches of several layers, so that nothing is found in a cache of the chip, and each layer's
output is the next one's query. Time is the median of the programs' wall time over the number of layers.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.kernels.backends import Unsupported
from svlm_jax.kernels.ring_attention.api import Regions, backends, ring_attention
from svlm_jax.kernels.ring_attention.int8 import quantize_rows, widen

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # Qwen2.5-VL-7B


def make_inputs(
    key: jax.Array, *, streams: int, tokens: int, regions: Regions, fill: float = 0.85, kv: str | None = None
) -> dict[str, Any]:
    """Random operands of one layer, bfloat16, the cache in eight bits where `kv` says so; a share of the slots is not valid."""
    slots, keys = regions[-1][1], jax.random.split(key, 7)

    def normal(index: int, *shape: int) -> jax.Array:
        return jax.random.normal(keys[index], shape, jnp.bfloat16)

    keep = quantize_rows if kv == "int8" else lambda rows: rows
    return {
        "q": normal(0, streams, len(regions), tokens, HEADS, HEAD_DIM),
        "k": keep(normal(1, streams, KV_HEADS, slots, HEAD_DIM)),
        "v": keep(normal(2, streams, KV_HEADS, slots, HEAD_DIM)),
        "valid": jax.random.uniform(keys[3], (streams, slots)) < fill,
        "self_k": normal(4, streams, KV_HEADS, tokens, HEAD_DIM),
        "self_v": normal(5, streams, KV_HEADS, tokens, HEAD_DIM),
        "self_valid": jax.random.uniform(keys[6], (streams, tokens)) < 0.97,
    }


def cudnn(q, k, v, valid, *, self_k, self_v, self_valid, regions: Regions) -> jax.Array:
    """cuDNN with a dense mask over cache and chunk; it knows one query for all regions, so this is a time and not an answer."""
    slots, tokens = k.shape[2], q.shape[2]
    keys, values = (jnp.swapaxes(jnp.concatenate(pair, 2), 1, 2) for pair in ((k, self_k), (v, self_v)))
    causal = jnp.tril(jnp.ones((tokens, tokens), bool)) & self_valid[:, None]
    mask = jnp.concatenate([jnp.broadcast_to(valid[:, None], (q.shape[0], tokens, slots)), causal], -1)[:, None]
    return jax.nn.dot_product_attention(q[:, -1], keys, values, mask=mask, implementation="cudnn")


def relative_error(ours: jax.Array, truth: jax.Array) -> float:
    found, true = (np.asarray(a, np.float64) for a in (ours, truth))
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def check(backend: str, *, streams: int, tokens: int, regions: Regions, kv: str | None = None) -> dict[str, float]:
    """Against the reference in float32, on fresh inputs with holes, an empty region. A cache in eight bits is taken for what it says."""
    worst = {"out": 0.0, "lse": 0.0}
    for seed in range(3):
        arrays = make_inputs(jax.random.key(seed), streams=streams, tokens=tokens, regions=regions, fill=(0.85, 0.02, 0.5)[seed], kv=kv)
        if seed == 1:
            arrays["valid"] &= jnp.arange(regions[-1][1]) >= regions[0][1]
        wide = {name: a if a.dtype == bool else widen(a, jnp.float32) for name, a in arrays.items()}
        with jax.default_matmul_precision("highest"):
            truth, true_lse = jax.jit(functools.partial(ring_attention, regions=regions, backend="reference"))(**wide)
        call = jax.jit(functools.partial(ring_attention, regions=regions, backend=backend))
        out, lse = call(**arrays)
        again, _ = call(**arrays)
        assert bool(jnp.array_equal(out, again)), f"{backend}: two runs differ in their bits"
        assert bool(jnp.isfinite(out).all()), f"{backend}: the output is not finite"
        worst["out"] = max(worst["out"], relative_error(out, truth))
        worst["lse"] = max(worst["lse"], float(jnp.abs(lse - true_lse).max()))
    return worst


def microseconds(layer: Callable, arrays: list[dict[str, Any]], repeats: int = 20) -> float:
    """Median time of one layer."""

    @jax.jit
    def program(arrays):
        q = arrays[0]["q"]
        for operands in arrays:
            out = layer(**(operands | {"q": q}))
            q = q + out[:, None].astype(q.dtype) * 1e-3
        return q

    jax.block_until_ready(program(arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(arrays))
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / len(arrays) * 1e6


def measure(*, streams: int, tokens: int, regions: Regions, layers: int = 8, kv: str | None = None) -> dict[str, object]:
    """One size: errors, times and rates of every backend that takes it, and of cuDNN."""
    arrays = [make_inputs(jax.random.key(100 + i), streams=streams, tokens=tokens, regions=regions, kv=kv) for i in range(layers)]
    held = float(np.mean([np.asarray(a["valid"]).mean() for a in arrays])) * regions[-1][1]
    operations = 4.0 * streams * tokens * HEADS * HEAD_DIM * (held + tokens / 2)
    row = HEAD_DIM + 4 if kv == "int8" else 2 * HEAD_DIM  # bytes of a key or a value in the cache
    fresh = 2.0 * HEAD_DIM * (2 * KV_HEADS * tokens + (len(regions) + 1) * HEADS * tokens)  # the chunk; copies of the query, and the output
    sizes = {"streams": streams, "tokens": tokens, "slots": regions[-1][1], "valid_slots": held, "kv": kv or "bfloat16"}
    record: dict[str, object] = {**sizes, "operations": operations, "bytes": streams * (2.0 * KV_HEADS * held * row + fresh)}
    names = backends(jax.devices()[0].platform)
    calls: dict[str, Callable] = {name: functools.partial(ring_attention, regions=regions, backend=name) for name in names}
    for name, call in calls.items():
        try:
            error = check(name, streams=streams, tokens=tokens, regions=regions, kv=kv)
            taken = microseconds(lambda call=call, **operands: call(**operands)[0], arrays)
            record[name] = {"us": taken, "relative_error": error["out"], "lse_error": error["lse"]}
        except Unsupported as reason:
            record[name] = {"unsupported": str(reason)}
    if kv is not None:
        return record | {"cudnn": {"unsupported": "takes no keys and values in eight bits"}}
    try:
        taken = microseconds(functools.partial(cudnn, regions=regions), arrays)
        record["cudnn"] = {"us": taken}
    except Exception as error:  # no cuDNN on this machine, or sizes that it does not take: the reason is the record
        record["cudnn"] = {"unsupported": str(error).splitlines()[0][:200]}
    return record
