"""Mosaic GPU backend, host side: which calls it takes, and what it hands to the kernel."""

import jax
import jax.numpy as jnp

from svlm_jax.kernels.ring_attention.api import Regions, Unsupported
from svlm_jax.kernels.ring_attention.tiles import visited_tiles


def check(q: jax.Array, k: jax.Array, self_k: jax.Array | None) -> None:
    """Unsupported names the reason."""
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        raise Unsupported(f"takes bfloat16, not {q.dtype} queries over {k.dtype} keys")
    if q.shape[-1] not in (64, 128):
        raise Unsupported(f"takes heads of 64 or 128, not {q.shape[-1]}")
    if self_k is None or q.shape[2] < 64:
        raise Unsupported("takes chunks of at least 64 new tokens")


def ring_attention_mosaic_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    self_k: jax.Array | None = None,
    self_v: jax.Array | None = None,
    self_valid: jax.Array | None = None,
    *,
    regions: Regions,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ring_attention`. The chunk is padded to a multiple of 128 rows, which count as keys for nobody."""
    check(q, k, self_k)
    from svlm_jax.kernels.ring_attention.mosaic_gpu_kernel import GROUPS, HIDDEN, ROWS, TILE, Shapes, prefill

    assert self_k is not None and self_v is not None and self_valid is not None
    batch, copies, length, heads, head_dim = q.shape
    if not k.shape[2]:  # no cache at all: the kernel is given one tile, which it does not visit
        k, v = (jnp.zeros((batch, k.shape[1], TILE, head_dim), k.dtype) for _ in range(2))
        valid, regions = jnp.zeros((batch, TILE), jnp.bool_), ((0, TILE),) * copies
    pad = -length % (GROUPS * ROWS)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0), (0, 0)))
    self_k, self_v = (jnp.pad(a, ((0, 0), (0, 0), (0, pad), (0, 0))) for a in (self_k, self_v))
    self_valid = jnp.pad(self_valid, ((0, 0), (0, pad)))
    shapes = Shapes(
        batch=batch,
        regions=copies,
        length=length + pad,
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=head_dim,
        dtype=jnp.dtype(q.dtype),
        scale=head_dim**-0.5 if scale is None else scale,
    )

    def hidden(mask: jax.Array) -> jax.Array:
        return jnp.where(mask, 0.0, HIDDEN).astype(jnp.float32)

    tiles, first = visited_tiles(valid, regions)
    out, lse = prefill(shapes, q, k, v, hidden(valid), self_k, self_v, hidden(self_valid), tiles, first)
    return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]
