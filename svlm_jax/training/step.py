"""One step of training: a pure function of the state and a batch. The state is donated; nothing else changes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from svlm_jax.config import ModelConfig
from svlm_jax.data.batch import Batch
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params, logical_axes
from svlm_jax.training.forward import Recipe, hidden_states
from svlm_jax.training.lora import LoraConfig, adapter_axes, adapters_of, init_adapters
from svlm_jax.training.loss import Sums, chunked_loss, token_losses
from svlm_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from svlm_jax.training.placement import ROWS
from svlm_jax.training.trainable import Flat, flatten, split, unflatten
from svlm_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is, but for where its data stands."""

    step: Int[jax.Array, ""]  # batches taken
    skipped: Int[jax.Array, ""]  # of these, batches that changed nothing
    trained: Flat  # parameters by path, float32
    frozen: Flat  # the others, in the type that is computed in
    moments: Any  # the optimizer's state
    history: Float[jax.Array, "2 S"]  # loss and gradient norm of the last S accepted steps, a ring; NaN where there is none yet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one step."""

    loss: Float[jax.Array, ""]  # nats a labelled token
    accuracy: Float[jax.Array, ""]  # labelled tokens that the largest logit names
    labels: Float[jax.Array, ""]
    gradient_norm: Float[jax.Array, ""]  # before clipping
    learning_rate: Float[jax.Array, ""]
    finite: Bool[jax.Array, ""]  # loss and gradients; where false, or `spike`, the state keeps its parameters and moments
    spike: Bool[jax.Array, ""]
    row_loss: Float[jax.Array, "B"]  # nats of each row, all its labels together


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes."""

    frozen: tuple[str, ...] = ("vision.*",)  # patterns of parameters that stay as they are, the merger included; all, with adapters
    accumulate: int = 1  # micro-batches of a batch
    loss_chunk: int = 512  # tokens of a row that go through the head at once
    dtype: str = "bfloat16"  # of the products; trained parameters are kept in float32 all the same
    spike_window: int = 128  # accepted steps that a new one is compared with, once there are as many
    spike_deviations: float = 6.0  # standard deviations above their mean from which a loss or norm is a spike; 0: none is
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self):
        for name in ("accumulate", "loss_chunk", "spike_window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype {self.dtype!r} is unknown: bfloat16 or float32")


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What a step needs to know besides its arguments."""

    model: ModelConfig
    config: StepConfig
    recipe: Recipe
    steps: int  # of the whole run, for the schedule

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.steps, self.axes())

    # The state

    def axes(self) -> Flat:
        """Logical axes of every parameter by path, adapters included."""
        axes = flatten(logical_axes(self.model, stacked=True))
        return axes | adapter_axes(self.model, self.config.lora) if self.config.lora.rank else axes

    def init(self, params: Any, key: Array) -> TrainState:
        """The state before the first step, of stacked parameters. To be jitted with `out_shardings`; the key draws adapters."""
        flat = flatten(params)
        if self.config.lora.rank:
            trained, frozen = init_adapters(self.model, self.config.lora, key), flat
        else:
            trained, frozen = split(flat, self.config.frozen)
        trained = {path: leaf.astype(jnp.float32) for path, leaf in trained.items()}
        frozen = {path: leaf.astype(self.config.dtype) for path, leaf in frozen.items()}
        history = jnp.full((2, self.config.spike_window), jnp.nan, jnp.float32)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, trained, frozen, self.optimizer.init(trained), history)

    def abstract_state(self) -> TrainState:
        """The state's shapes with their shardings: nothing is allocated."""
        shapes = jax.eval_shape(self.init, abstract_params(self.model, stacked=True), jax.eval_shape(lambda: jax.random.key(0)))
        axes, place = self.axes(), self.recipe.placement

        def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            name = next((str(part.key) for part in reversed(path) if isinstance(part, jax.tree_util.DictKey)), "")
            sharding = place.weight(leaf.shape, axes[name]) if name in axes else place.sharding()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, shapes)

    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

    # The step

    def loss(self, used: Flat, frozen: Flat, batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """The sum over labelled tokens of a micro-batch, `used` being the trained parameters in the type of the products."""
        adapters, weights = adapters_of(used | frozen, self.config.lora)
        model, x = hidden_states(unflatten(weights), self.model, batch, self.recipe, adapters)
        return chunked_loss(model.text, x, batch, chunk=self.config.loss_chunk)

    def used(self, trained: Flat) -> Flat:
        """Trained parameters in the type of the products, cut as before, so that what is gathered later is half as much."""
        place, axes = self.recipe.placement, self.axes()

        def cast(path: str, leaf: Array) -> Array:
            return jax.lax.with_sharding_constraint(leaf.astype(self.config.dtype), place.weight(leaf.shape, axes[path]))

        return {path: cast(path, leaf) for path, leaf in trained.items()}

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Flat, Sums]:
        """Gradients in float32 of the mean over all labelled tokens of the batch, and its sums."""
        used, count = self.used(state.trained), self.config.accumulate
        differentiate = jax.value_and_grad(self.loss, has_aux=True)

        def part(micro: Batch) -> tuple[Flat, Sums]:
            (_, sums), gradients = differentiate(used, state.frozen, micro)
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

        if count == 1:
            total, sums = part(batch)
        else:
            micros = self._micros(batch)
            zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), used)
            zero = jax.lax.with_sharding_constraint(zero, self._trained_shardings(used))

            def add(total: Flat, micro: Batch) -> tuple[Flat, Sums]:
                micro = jax.lax.with_sharding_constraint(micro, self.recipe.placement.batch(micro))
                gradients, sums = part(micro)
                return jax.tree.map(jnp.add, total, gradients), sums

            total, parts = jax.lax.scan(add, zero, micros)
            sums = Sums(parts.loss.sum(), parts.labels.sum(), parts.correct.sum(), parts.row_loss.T.reshape(-1))
        return jax.tree.map(lambda g: g / jnp.maximum(sums.labels, 1), total), sums

    def _trained_shardings(self, flat: Flat) -> dict[str, NamedSharding]:
        axes, place = self.axes(), self.recipe.placement
        return {path: place.weight(leaf.shape, axes[path]) for path, leaf in flat.items()}

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The state after one batch. Where loss or gradients are not finite, or a spike, only counters and nothing else change."""
        gradients, sums = self.gradients(state, batch)
        with jax.named_scope("optimizer"):
            loss, norm = sums.loss / jnp.maximum(sums.labels, 1), optax.tree.norm(gradients)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            spike = finite & self._is_spike(state.history, jnp.stack([loss, norm]))
            keep = finite & ~spike
            updates, moments = self.optimizer.update(gradients, state.moments, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            trained, moments = jax.tree.map(lambda new, old: jnp.where(keep, new, old), (trained, moments), (state.trained, state.moments))
            accepted = state.step - state.skipped
            history = state.history.at[:, accepted % self.config.spike_window].set(jnp.stack([loss, norm]))
            after = TrainState(
                state.step + 1,
                state.skipped + ~keep,
                trained,  # type: ignore[arg-type]
                state.frozen,
                moments,
                jnp.where(keep, history, state.history),
            )
            rate = jnp.asarray(schedule(self.config.optimizer, self.steps)(accepted), jnp.float32)
        accuracy = sums.correct / jnp.maximum(sums.labels, 1)
        return after, Metrics(loss, accuracy, sums.labels, norm, rate, finite, spike, sums.row_loss)

    def _is_spike(self, history: Array, found: Array) -> Array:
        """Whether loss or norm is far above those of the last steps. Never before there are enough of them (NaN compares false)."""
        if not self.config.spike_deviations:
            return jnp.zeros((), bool)
        limit = history.mean(axis=1) + self.config.spike_deviations * history.std(axis=1)
        return jnp.any(found > limit)

    def evaluated(self, batch: Batch) -> Callable[[TrainState, Batch], tuple[Array, Array]]:
        """The jitted function of a state and a batch shaped like this one: `loss.token_losses`, cut over rows alone. Nothing is donated."""
        count, place = self.config.accumulate, self.recipe.placement

        def part(state: TrainState, micro: Batch) -> tuple[Array, Array]:
            adapters, weights = adapters_of(self.used(state.trained) | state.frozen, self.config.lora)
            model, x = hidden_states(unflatten(weights), self.model, micro, self.recipe, adapters)
            return token_losses(model.text, x, micro, chunk=self.config.loss_chunk)

        def whole(state: TrainState, batch: Batch) -> tuple[Array, Array]:
            if count == 1:
                return part(state, batch)
            found = jax.lax.map(lambda micro: part(state, jax.lax.with_sharding_constraint(micro, place.batch(micro))), self._micros(batch))
            return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, a.shape[-1]), found)

        return jax.jit(whole, in_shardings=(self.shardings(), place.batch(batch)), out_shardings=place.sharding(ROWS))

    def _micros(self, batch: Batch) -> Batch:
        """Micro-batches [accumulate, B, ...] of every `accumulate`-th row, so that each device's rows stay where they are."""
        count = self.config.accumulate
        return jax.tree.map(lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch)

    def compiled(self, batch: Batch) -> jax.stages.Compiled:
        """The step for batches like this one (arrays or shapes), ahead of time: the state is donated."""
        return self.jitted(batch).lower(self.abstract_state(), self.placed(batch)).compile()

    def jitted(self, batch: Batch) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """The step as a jitted function of a donated state and a batch shaped like this one."""
        rows, tokens = batch.tokens.shape
        if rows % self.config.accumulate:
            raise UserError(f"{rows} rows a batch do not divide into accumulate = {self.config.accumulate} micro-batches")
        place = self.recipe.placement
        place.check(rows=rows // self.config.accumulate, tokens=tokens)
        state = self.shardings()
        return jax.jit(self.step, in_shardings=(state, place.batch(batch)), out_shardings=(state, place.sharding()), donate_argnums=0)

    def placed(self, batch: Batch) -> Batch:
        """The shapes of a batch with their shardings."""
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), batch, self.recipe.placement.batch(batch))
