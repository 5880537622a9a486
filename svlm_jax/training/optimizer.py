"""AdamW or Muon after clipping, on a cosine with warm-up: optax's parts, with the moments in a type of their own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from svlm_jax.errors import UserError
from svlm_jax.types import Array

DTYPES = ("float32", "bfloat16")
KINDS = ("adamw", "muon")
ADAM_SIZE = 0.2  # what Muon's updates are scaled to, the root mean square of AdamW's (arXiv 2502.16982): one learning rate serves both
WIDTHS = frozenset(("mlp", "heads", "kv_heads", "head_dim"))  # logical axes that, with `embed`, make a product's matrix


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with StreamingVLM's settings: 1e-5, cosine to zero, 3% warm-up.

    With `kind` muon (arXiv 2502.16982) the layers' products take orthogonalised steps, and Nesterov's AdamW has all else: for models that are
    trained from random weights.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-5
    warmup: float = 0.03  # part of all steps
    final: float = 0.0  # the learning rate at the end, as a part of its peak
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # of products alone: norms and biases are not decayed
    clip: float = 1.0  # the gradients' norm at most
    moments: str = "float32"  # or bfloat16: half the memory, rounded at random so that small changes add up

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"optimizer.kind {self.kind!r} is unknown: {' or '.join(KINDS)}")
        if self.kind == "muon" and self.moments != "float32":
            raise UserError("optimizer.kind muon keeps its moments in float32: leave optimizer.moments out")
        for name, low, high in (("warmup", 0, 1), ("final", 0, 1), ("b1", 0, 1), ("b2", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"optimizer.{name} must be from {low} to {high}, not {getattr(self, name)}")
        for name in ("learning_rate", "clip", "epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"optimizer.{name} must be positive, not {getattr(self, name)}")
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay must not be negative, but is {self.weight_decay}")
        if self.moments not in DTYPES:
            raise UserError(f"optimizer.moments {self.moments!r} is unknown: {' or '.join(DTYPES)}")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step: linear up to its peak, then half a cosine down."""
    warm = round(config.warmup * steps)
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0 if warm else peak, peak, warm, max(steps, warm + 1), peak * config.final)


def make_optimizer(config: OptimizerConfig, steps: int, axes: Mapping[str, tuple[str | None, ...]]) -> optax.GradientTransformation:
    """Takes float32 gradients as a flat dict by path; `axes` are the logical axes of each."""
    if config.kind == "muon":

        def matrices(params: Any) -> Any:
            return {path: _matrix(axes[path]) for path in params}

        muon = optax.contrib.muon(
            schedule(config, steps),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=ADAM_SIZE,
            muon_weight_dimension_numbers=matrices,
        )
        return optax.chain(optax.clip_by_global_norm(config.clip), muon)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        adam if config.moments == "float32" else in_bfloat16(adam),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _matrix(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a product's weight are its matrix: queries, keys and values, gate and up, and layers are matrices of their own."""
    given = tuple(i for i, axis in enumerate(axes) if axis == "embed")
    taken = tuple(i for i, axis in enumerate(axes) if axis in WIDTHS)
    return MuonDimensionNumbers(given, taken) if given and taken else None


def _decayed(params: dict[str, Any]) -> dict[str, bool]:
    return {path: not any(part in path.rsplit(".", 1)[-1] for part in ("norm", "bias")) for path in params}


def in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with its floating state kept in bfloat16 and computed in float32.

    Rounded to the nearest, a second moment in bfloat16 never shrinks: with b2 = 0.999 a step changes it by less than half of its last
    digit. Rounded up or down at random, by how near each is, it is right on average. The randomness is the step's number.
    """

    def kept(state: Any, key: Array) -> Any:
        leaves, tree = jax.tree.flatten(state)
        return jax.tree.unflatten(tree, [_rounded(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)])

    def init(params: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide: Any = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, state)
        updates, wide = inner.update(updates, wide, params)
        return updates, kept(wide, jax.random.key(wide.count))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _rounded(x: Array, key: Array) -> Array:
    """Float32 to bfloat16, up or down at random; all else as it is."""
    if x.dtype != jnp.float32:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    up = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)
