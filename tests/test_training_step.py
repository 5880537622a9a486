"""One step: accumulation, freezing, remat, adapters, spikes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_training
from small_training import batch, config, start, trainer

from svlm_jax.data.batch import IGNORED
from svlm_jax.errors import UserError
from svlm_jax.training.lora import LoraConfig, merged
from svlm_jax.training.optimizer import OptimizerConfig
from svlm_jax.training.remat import POLICIES
from svlm_jax.training.trainable import flatten, split, unflatten


def gradients(step, data, **kwargs):
    made = trainer(step, **kwargs)
    return jax.jit(made.gradients)(start(made), data)


@pytest.fixture(scope="module")
def whole():
    return gradients(config(), batch())


@pytest.fixture(scope="module")
def stepping():
    """(trainer, its step)."""
    made = trainer(config(spike_window=3, spike_deviations=6.0))
    return made, made.jitted(batch())


def close(found, wanted, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5), found, wanted)


def test_accumulated_equals_whole(whole):
    counts = (batch().labels != IGNORED).sum(1)
    assert len(set(counts.tolist())) > 1  # a mean of means would differ
    close(gradients(config(accumulate=2), batch()), whole)


def test_every_remat_policy_computes_the_same(whole):
    for policy in sorted(set(POLICIES) - {"gate_up", "nothing"}):  # `whole` has the first, the tiny preset the other
        close(gradients(config(), batch(), remat=policy), whole)
    with pytest.raises(UserError, match=r"remat 'some' is unknown: nothing keeps everything"):
        gradients(config(), batch(), remat="some")


def test_what_is_frozen_has_neither_gradients_nor_moments(stepping):
    made, go = stepping
    before = jax.tree.map(np.asarray, start(made))
    state, _ = go(start(made), batch())
    state, metrics = go(state, batch())
    assert all(path.startswith("vision.") for path in state.frozen) and not any(path.startswith("vision.") for path in state.trained)
    paths = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(state.moments) if leaf.ndim}
    assert paths == set(state.trained)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)
    assert all(np.any(state.trained[path] != before.trained[path]) for path in state.trained)
    assert bool(metrics.finite) and int(state.step) == 2 and int(state.skipped) == 0 and float(metrics.loss) > 0


def test_vision_can_be_trained():
    found, _ = gradients(config(frozen=("text.*",)), batch())
    assert set(found) == set(trainer(config()).abstract_state().frozen)
    assert all(np.abs(np.asarray(found[path])).max() > 0 for path in found if path != "vision.merger_out")


def test_patterns_that_match_nothing_or_all():
    flat = {"text.layers.qkv": 0, "vision.blocks.0.qkv": 1, "vision.blocks.1.qkv": 2}
    assert split(flat, ("vision.*",)) == ({"text.layers.qkv": 0}, {"vision.blocks.0.qkv": 1, "vision.blocks.1.qkv": 2})
    with pytest.raises(UserError, match=r"'visual\*' matches no parameter: they are called text.layers.qkv, vision.blocks.0.qkv$"):
        split(flat, ("visual*",))
    with pytest.raises(UserError, match="leaves nothing to train"):
        split(flat, ("*",))
    assert flatten(unflatten(flat)) == flat


def test_moments_in_bfloat16():
    """Rounded at random they follow float32's; rounded to the nearest the second moment would stand still."""
    for moments, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
        optimizer = OptimizerConfig(learning_rate=1e-3, warmup=0.0, moments=moments)
        made = trainer(config(optimizer=optimizer))
        params = {"w": jnp.ones(4096)}
        state = made.optimizer.init(params)
        assert state[1].nu["w"].dtype == dtype
        update = jax.jit(made.optimizer.update)
        for gradient in [0.01] * 1 + [0.001] * 300:
            _, state = update({"w": jnp.full(4096, gradient)}, state, params)
        mean = np.asarray(state[1].nu["w"], np.float32).mean()
        wanted = 1e-3 * 0.999**300 * 1e-4 + (1 - 0.999**300) * 1e-6
        np.testing.assert_allclose(mean, wanted, rtol=0.02)


def test_muon_takes_orthogonal_steps():
    """Of each matrix: queries, keys, values and layers are matrices of their own. All else is Adam's, whose first step is as large for each."""
    rate = 1e-3
    made = trainer(config(optimizer=OptimizerConfig(kind="muon", learning_rate=rate, warmup=0.0)))
    state = start(made)
    axes, rng = made.axes(), np.random.default_rng(0)
    gradients = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in state.trained.items()}
    updates, _ = jax.jit(made.optimizer.update)(gradients, state.moments, state.trained)
    layers, width, kv_heads, kinds, head_dim = updates["text.layers.qkv"].shape
    for layer in range(layers):
        for kind in range(kinds):
            matrix = np.asarray(updates["text.layers.qkv"][layer, :, :, kind]).reshape(width, kv_heads * head_dim)
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * rate * max(matrix.shape) ** 0.5)
            assert values.min() > 0.6 and values.max() < 1.3, values  # five iterations leave that much
    assert axes["text.layers.attention_norm"] == ("layers", "norm")
    for path in ("text.layers.attention_norm", "text.embedding", "text.head"):
        low, high = np.percentile(np.abs(updates[path]), (5, 95))  # but where a gradient is as small as epsilon
        assert high / low < 1.01
    with pytest.raises(UserError, match="muon keeps its moments in float32"):
        OptimizerConfig(kind="muon", moments="bfloat16")


def test_spikes_and_what_is_not_finite_change_nothing(stepping):
    made, go = stepping
    state = start(made)
    for _ in range(3):
        state, metrics = go(state, batch())
        assert not metrics.spike
    history = np.asarray(state.history)
    assert np.isfinite(history).all()
    calm = dataclasses.replace(state, history=jnp.full_like(state.history, 1e-3))  # so that anything is a spike
    kept = jax.tree.map(np.asarray, (state.trained, state.moments))
    state, metrics = go(calm, batch())
    assert bool(metrics.spike) and bool(metrics.finite) and int(state.skipped) == 1 and int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, (state.trained, state.moments), kept)
    broken = {**state.frozen, "vision.patch_embed": state.frozen["vision.patch_embed"] * np.nan}
    state, metrics = go(dataclasses.replace(state, frozen=broken), batch())
    assert not bool(metrics.finite) and int(state.skipped) == 2 and np.isnan(metrics.row_loss).all()
    jax.tree.map(np.testing.assert_array_equal, (state.trained, state.moments), kept)


def test_adapters_learn_and_merge():
    step = config(lora=LoraConfig(rank=4, alpha=8.0, on=("text.layers.*",)))
    made, plain = trainer(step), trainer(config())
    state, go, losses = start(made), made.jitted(batch()), []
    assert {path.rsplit(".", 1)[0] for path in state.trained} == {f"text.layers.{name}" for name in ("qkv", "out", "gate_up", "down")}
    whole = jax.jit(lambda flat: plain.loss({}, flat, batch()))
    for _ in range(3):
        merged_loss, sums = whole(merged(jax.tree.map(np.asarray, state.trained | state.frozen), step.lora))
        state, metrics = go(state, batch())
        losses.append(float(metrics.loss))
        np.testing.assert_allclose(float(merged_loss) / float(sums.labels), losses[-1], rtol=1e-5)
    start_loss, _ = whole(flatten(small_training.params()))  # adapters change nothing before they are trained
    np.testing.assert_allclose(float(start_loss) / float(sums.labels), losses[0], rtol=1e-6)
    assert losses[2] < losses[1] < losses[0]
    with pytest.raises(UserError, match="names no product of a layer"):
        trainer(config(lora=LoraConfig(rank=4, on=("vision.*",)))).abstract_state()


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"4 rows a batch do not divide into accumulate = 3 micro-batches"):
        trainer(config(accumulate=3)).jitted(small_training.batch())
