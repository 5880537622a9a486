"""Attention over packed rows, chosen by name: tokens see their own segment only.

    xla      scores written out; every platform, and memory with the square of the row
    splash   Pallas kernels of JAX for TPU; blocks above the diagonal are not computed
    cudnn    cuDNN's flash attention: each segment is its own sequence, so nothing outside segments is computed; NVIDIA from Ampere on

A choice that cannot serve says why. `choose("auto", ...)` takes the first that can and reports why the others cannot.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from svlm_jax.config import ModelConfig
from svlm_jax.data.eviction import Eviction
from svlm_jax.errors import UserError
from svlm_jax.model.packed_vision import plain_bin_attention, plain_window_attention
from svlm_jax.model.qwen_vl import causal_attention
from svlm_jax.training.placement import ROWS
from svlm_jax.training.remat import RESIDUALS
from svlm_jax.training.streamed_attention import Streamed, plain_blocks, streamed_attention
from svlm_jax.types import Array, Int

ORDER = ("splash", "cudnn", "xla")  # of "auto"
LANES = 128  # a TPU's; splash wants rows and heads in multiples of it
Attend = Callable[[Array, Array, Array, Array], Array]  # queries [B, T, N, H], keys and values [B, T, K, H], segments [B, T]


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attentions of a step. `rejected` says why those before it in the order were not taken, one line each."""

    name: str
    decoder: Attend  # causal
    vision: Attend  # among the patches of a bin, both ways
    windows: Attend  # among the patches of a window, both ways; padding is segment 0
    streamed: Callable[[Streamed, Eviction], Array]  # of the decoder, where samples have a window
    reach: int  # tokens that this window goes back at most
    memory: int  # places of a sample's previous text
    rejected: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """What attention is to be chosen for."""

    model: ModelConfig
    mesh: Mesh | AbstractMesh
    platform: str  # "cpu", "gpu" or "tpu"
    row_tokens: int
    max_segments: int
    dtype: Any
    reach: int = 0  # tokens that a window of samples goes back at most
    memory: int = 0  # places of a sample's previous text


def choose(name: str, job: Job) -> Attention:
    """The attention of that name, or the first that serves for "auto". UserError where it cannot serve, or is unknown."""
    if name == "auto":
        reasons = {each: REASONS[each](job) for each in ORDER}
        taken = next(each for each in ORDER if reasons[each] is None)
        rejected = tuple(f"{each}: {reasons[each]}" for each in ORDER[: ORDER.index(taken)])
        return dataclasses.replace(MAKERS[taken](job), rejected=rejected)
    if name not in MAKERS:
        raise UserError(f"attention {name!r} is unknown: auto, {', '.join(MAKERS)}")
    reason = REASONS[name](job)
    if reason is not None:
        raise UserError(f"attention {name!r} cannot serve here: {reason}")
    return MAKERS[name](job)


# Splash attention


def _why_not_splash(job: Job) -> str | None:
    t, shards = job.model.text, job.mesh.shape
    if job.platform != "tpu":
        return f"it is for TPUs, and this is a {job.platform}"
    if job.row_tokens % (LANES * shards["sequence"]):
        return f"rows of {job.row_tokens} tokens do not divide by {LANES} x sequence = {shards['sequence']}"
    if t.head_dim % LANES:  # type: ignore[operator]
        return f"heads of {t.head_dim} are not a multiple of {LANES}"
    if t.num_key_value_heads % shards["tensor"]:
        return f"{t.num_key_value_heads} key-value heads do not divide by tensor = {shards['tensor']}"
    return None


def _splash(job: Job) -> Attention:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shards = job.mesh.shape

    def block(size: int, most: int = 512) -> int:
        """The largest multiple of 128 up to `most` that divides `size`."""
        return max(b for b in range(LANES, min(most, size) + 1, LANES) if size % b == 0)

    def make(mask: Any, heads: int, length: int, local: int, head_shards: int, sequence: int) -> Any:
        q, kv = block(local), block(length)
        sizes = kernels.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        )
        return kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=head_shards,
            q_seq_shards=sequence,
            residual_checkpoint_name=RESIDUALS,
        )

    def run(kernel: Any, q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array) -> Array:
        """One shard: heads first, and queries scaled, as the kernel has it."""
        q, k, v = (a.swapaxes(1, 2) for a in ((q * q.shape[-1] ** -0.5).astype(q.dtype), k, v))

        def row(q, k, v, qs, ks):
            return kernel(q, k, v, segment_ids=kernels.SegmentIds(qs, ks))

        return jax.vmap(row)(q, k, v, q_segments, k_segments).swapaxes(1, 2)

    def decoder(q: Array, k: Array, v: Array, segments: Array) -> Array:
        length, sequence, tensor = q.shape[1], shards["sequence"], shards["tensor"]
        with jax.ensure_compile_time_eval():
            kernel = make(masks.CausalMask((length, length)), q.shape[2], length, length // sequence, tensor, sequence)
        spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(job.mesh, PartitionSpec("tensor", "sequence")))  # type: ignore[arg-type]
        queries, keys = PartitionSpec(ROWS, "sequence", "tensor"), PartitionSpec(ROWS, None, "tensor")
        return jax.shard_map(
            run,
            mesh=job.mesh,
            in_specs=(spec, queries, keys, keys, PartitionSpec(ROWS, "sequence"), PartitionSpec(ROWS)),
            out_specs=queries,
            check_vma=False,
        )(kernel, q, k, v, segments, segments)

    def vision(q: Array, k: Array, v: Array, segments: Array) -> Array:
        patches, heads, width = q.shape[1:]
        length = patches + -patches % LANES
        tensor = "tensor" if heads % shards["tensor"] == 0 else None
        bins = ROWS if q.shape[0] % (shards["data"] * shards["fsdp"] * shards["sequence"]) else (*ROWS, "sequence")
        with jax.ensure_compile_time_eval():
            local = heads // (shards["tensor"] if tensor else 1)
            kernel = make(masks.FullMask((length, length)), local, length, length, 1, 1)
        spec = PartitionSpec(bins, None, tensor)

        def shard(q, k, v, segments):
            # Heads of 80 are filled up with zeros, which change no score; the scale is that of the true size. Bins are filled up
            # with patches of no segment
            missing = -width % LANES
            fill = [(0, 0), (0, length - patches), (0, 0), (0, missing)]
            q = (q * (1 + missing / width) ** 0.5).astype(q.dtype)
            q, k, v = (jnp.pad(a, fill) for a in (q, k, v))
            segments = jnp.pad(segments, fill[:2])
            return run(kernel, q, k, v, segments, segments)[:, :patches, :, :width]

        return jax.shard_map(
            shard, mesh=job.mesh, in_specs=(spec, spec, spec, PartitionSpec(bins)), out_specs=spec, check_vma=False
        )(q, k, v, segments)

    # The vision tower's windows are smaller than its blocks, and its masks are made before rows are known
    return Attention("splash", decoder, vision, plain_window_attention, _plain_streamed(job), job.reach, job.memory)


# cuDNN


def _cudnn_packed() -> Callable[..., Any]:
    """JAX's entry to cuDNN that takes packed rows; `jax.nn.dot_product_attention` has no argument for them yet."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    if not {"q_offsets", "kv_offsets", "q_seqlen", "kv_seqlen", "mask_type"} <= set(inspect.signature(cudnn.dot_product_attention).parameters):
        raise ImportError("this JAX's cuDNN attention takes no packed rows")
    return functools.partial(cudnn.dot_product_attention, mask_type=cudnn.MaskType.PADDING_CAUSAL)


def _why_not_cudnn(job: Job) -> str | None:
    t, shards = job.model.text, job.mesh.shape
    if job.platform != "gpu":
        return f"it is for NVIDIA GPUs, and this is a {job.platform}"
    if jnp.dtype(job.dtype).name not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not {jnp.dtype(job.dtype).name}"
    if shards["sequence"] > 1:
        return f"its packed rows cannot be cut by sequence = {shards['sequence']}"
    if t.head_dim > 128 or t.head_dim % 8:  # type: ignore[operator]
        return f"heads of {t.head_dim} are not a multiple of 8 up to 128"
    if t.num_key_value_heads % shards["tensor"]:
        return f"{t.num_key_value_heads} key-value heads do not divide by tensor = {shards['tensor']}"
    try:
        _cudnn_packed()
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def segment_bounds(segments: Int[Array, "B T"], count: int) -> tuple[Int[Array, "B S"], Int[Array, "B S+1"]]:
    """Lengths and first rows of segments 1 to S = `count`, -1 where there is none (the last first row always), as cuDNN has it."""
    number = jnp.arange(1, count + 1, dtype=segments.dtype)
    lengths = jnp.sum(segments[:, None, :] == number[:, None], axis=-1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    starts = jnp.pad(jnp.where(lengths > 0, starts, -1), [(0, 0), (0, 1)], constant_values=-1)
    return jnp.where(lengths > 0, lengths, -1), starts


def _cudnn(job: Job) -> Attention:
    packed = _cudnn_packed()

    def decoder(q: Array, k: Array, v: Array, segments: Array) -> Array:
        spec = PartitionSpec(ROWS, None, "tensor")

        def shard(q, k, v, segments):
            lengths, offsets = segment_bounds(segments, max(2, job.max_segments))  # with room for one alone it takes no offsets
            # The kernel does not write rows of no segment, neither of its output nor of the gradients: both are set to zero here
            there = (segments > 0)[..., None, None]
            q, k, v = (jnp.where(there, a, 0) for a in (q, k, v))
            heads = packed(
                q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets, scale=float(q.shape[-1] ** -0.5)
            )
            return jnp.where(there, heads, 0)

        return jax.shard_map(
            shard, mesh=job.mesh, in_specs=(spec, spec, spec, PartitionSpec(ROWS)), out_specs=spec, check_vma=False
        )(q, k, v, segments)

    def vision(q: Array, k: Array, v: Array, segments: Array) -> Array:
        mask = segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    def blocks(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")

    def streamed(x: Streamed, facts: Eviction) -> Array:
        rows, heads = PartitionSpec(ROWS), PartitionSpec(ROWS, None, "tensor")
        run = functools.partial(streamed_attention, reach=job.reach, memory=job.memory, blocks=blocks)
        return jax.shard_map(run, mesh=job.mesh, in_specs=(heads, rows), out_specs=heads, check_vma=False)(x, facts)

    double = 2 * job.model.text.head_dim <= 128  # type: ignore[operator]  (its heads are twice as wide)
    return Attention("cudnn", decoder, vision, vision, streamed if double else _plain_streamed(job), job.reach, job.memory)


def _plain_streamed(job: Job) -> Callable[[Streamed, Eviction], Array]:
    return functools.partial(streamed_attention, reach=job.reach, memory=job.memory, blocks=plain_blocks)


def _xla(job: Job) -> Attention:
    def decoder(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return causal_attention(q, k, v, segments)

    return Attention("xla", decoder, plain_bin_attention, plain_window_attention, _plain_streamed(job), job.reach, job.memory)


REASONS: dict[str, Callable[[Job], str | None]] = {"splash": _why_not_splash, "cudnn": _why_not_cudnn, "xla": lambda job: None}
MAKERS: dict[str, Callable[[Job], Attention]] = {"splash": _splash, "cudnn": _cudnn, "xla": _xla}
