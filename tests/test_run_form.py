"""Checkpoints of training runs read like any other: to go on from the weights alone, and to convert them."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small

from svlm_jax import cli
from svlm_jax.checkpoints.adapters import read_adapter
from svlm_jax.checkpoints.convert import convert
from svlm_jax.checkpoints.hub_config import read_config
from svlm_jax.checkpoints.inspect import inspect
from svlm_jax.checkpoints.load import find, load, load_params
from svlm_jax.checkpoints.save import save_params
from svlm_jax.configs.sft_tiny import config as sft_tiny
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError
from svlm_jax.model.qwen_vl import abstract_params
from svlm_jax.sharding import make_mesh, param_shardings
from svlm_jax.training.checkpoint import Checkpoints, describe
from svlm_jax.training.config import CheckpointConfig, as_json, override
from svlm_jax.training.lora import merged
from svlm_jax.training.setup import make_trainer
from svlm_jax.training.trainable import flatten

sys.path.insert(0, str(Path(__file__).parent.parent))  # train.py


def write(out: Path, *changes: str):
    """(the trainer, its state) of a run that saved twice: step 3 is the start with every trained number changed."""
    from train import first_state

    config = override(sft_tiny(), changes)
    folder = find(config.weights)[0]
    model = read_config(folder)
    trainer = make_trainer(config, model, make_mesh(), "cpu")
    state = first_state(trainer, config, folder)
    rng = np.random.default_rng(0)
    noisy = {path: jax.numpy.asarray(leaf + rng.normal(0, 0.02, leaf.shape).astype(np.float32)) for path, leaf in state.trained.items()}
    later = dataclasses.replace(state, trained=noisy)
    checkpoints = Checkpoints.open(out / "checkpoints", CheckpointConfig())
    checkpoints.save(2, state, {})
    checkpoints.save(3, later, {})
    checkpoints.close()
    (out / "config.json").write_text(as_json(config))
    describe(out, model, folder, folder, config.step.dtype)
    return trainer, later


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, *write(out)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted") / "run"
    return out, *write(out, "step.lora.rank=4", "step.lora.alpha=8", "step.dtype=bfloat16")


@pytest.mark.parametrize(("family", "frozen"), [("qwen2_vl", "vision.*"), ("qwen3_vl", "()")])
def test_a_run_of_any_family_is_a_model_of_it(family, frozen, tmp_path):
    """Of towers without windows: a step on packed clips, stamped and deep ones too, with the tower frozen or not."""
    from train import train

    config, p = small.FAMILIES[family](1024), np.random.default_rng(0)
    params = jax.tree.map(lambda a: p.normal(0, 0.05, a.shape).astype(np.float32), abstract_params(config))
    weights = save_params(params, config, tmp_path / "weights", tokenizer_files_from=tiny_path())
    where = [f"weights={weights}", f"out={tmp_path / 'run'}", f"step.frozen={frozen}", "data.loader.sample.layout=streaming"]
    state = train(override(sft_tiny(), ["steps=1", *where]))
    assert int(state.step) == 1 and int(state.skipped) == 0
    found = load(tmp_path / "run")
    assert dataclasses.replace(found.config, name="") == dataclasses.replace(config, name="")
    changed = {path for path, before in flatten(params).items() if np.any(flatten(found.params)[path] != before)}
    still = {path for path in flatten(params) if path.startswith("vision.")} if frozen != "()" else set()
    assert changed == set(flatten(params)) - still


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_is_converted_as_its_last_checkpoint_and_loads_like_any_model(plain, tmp_path):
    out, trainer, state = plain
    done = convert(out, tmp_path / "hf")
    assert done.form == "hf" and done.dtype == np.float32
    there = load(tmp_path / "hf", stacked=True)
    equal(flatten(there.params), {**state.trained, **state.frozen})
    assert dataclasses.replace(there.config, name="") == dataclasses.replace(trainer.model, name="")
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"
    mesh = make_mesh()
    shardings = param_shardings(trainer.model, mesh, stacked=True)
    direct = load(out / "checkpoints" / "3", stacked=True, shardings=shardings)
    assert direct.config.name == "run-3" and direct.tokenizer.vocab_size == there.tokenizer.vocab_size
    equal(direct.params, there.params)
    layers = load(out).params["text"]["layers"]
    np.testing.assert_array_equal(layers[1]["qkv"], state.trained["text.layers.qkv"][1])
    first = flatten(load_params(out / "checkpoints" / "2", trainer.model, stacked=True))
    assert np.any(first["text.layers.qkv"] != state.trained["text.layers.qkv"])
    found = inspect(out)
    assert (
        found.path == out / "checkpoints" / "3"
        and found.form == "a training run's form"
        and found.dtypes == {"float32": 4 * found.parameters}
    )


def test_a_start_from_another_run_is_exact(plain):
    from train import first_state

    out, trainer, state = plain
    weights = find(out)[0]
    begun = first_state(trainer, override(sft_tiny(), [f"weights={out}"]), weights)
    equal((begun.trained, begun.frozen), (state.trained, state.frozen))
    assert int(begun.step) == 0 and not np.any(begun.moments[1].nu["text.layers.qkv"])


def test_adapters_are_merged_on_the_way(adapted, tmp_path):
    out, trainer, state = adapted
    done = convert(out, tmp_path / "hf")
    assert done.dtype == jax.numpy.bfloat16  # of the weights beneath
    whole = merged(state.trained | state.frozen, trainer.config.lora)
    assert np.any(np.asarray(whole["text.layers.qkv"]) != np.asarray(state.frozen["text.layers.qkv"]))
    close = {path: np.asarray(leaf, np.float32) for path, leaf in whole.items()}
    for found in (load(tmp_path / "hf", stacked=True).params, load(out, stacked=True).params):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-7, atol=1e-6), flatten(found), close)
    exact = flatten(load_params(find(out)[0], trainer.model, dtype="float32", stacked=True))
    a, b = (np.asarray(state.trained[f"text.layers.down.lora_{half}"]) for half in "ab")
    wanted = np.asarray(state.frozen["text.layers.down"], np.float32) + 2 * (a @ b)
    np.testing.assert_allclose(exact["text.layers.down"], wanted, atol=1e-6)


def test_adapters_alone_are_what_peft_takes(adapted, plain, tmp_path):
    """q, k and v share what they come from; merged into the run's own base, they are the run's weights."""
    out, trainer, state = adapted
    assert cli.run(["convert", str(out), str(tmp_path / "adapter"), "--to", "peft"]) == 0
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], stated["base_model_name_or_path"]) == (4, 8.0, str(tiny_path()))
    text = trainer.model.text
    assert len(stated["target_modules"]) == 7 * text.num_hidden_layers
    pairs = read_adapter(tmp_path / "adapter", trainer.model)
    key, query = (pairs[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "kq")
    np.testing.assert_array_equal(key.a, query.a)
    np.testing.assert_array_equal(key.a.T, state.trained["text.layers.qkv.lora_a"][1])
    heads = np.asarray(state.trained["text.layers.qkv.lora_b"][1])[:, :, -2]  # rank, head, width
    np.testing.assert_array_equal(key.b.T, heads.reshape(4, -1))
    base = convert(tiny_path(), tmp_path / "base", form="hf", dtype=np.float32).path
    merged = convert(base, tmp_path / "merged", form="hf", adapter=tmp_path / "adapter").path
    wanted = flatten(load_params(find(out)[0], trainer.model, dtype="float32", stacked=True))
    found = flatten(load(merged, stacked=True).params)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-6, err_msg=path)
    half = convert(out, tmp_path / "half", form="peft", dtype=jax.numpy.bfloat16)
    assert half.nbytes == 2 * sum(leaf.size for leaf in state.trained.values()) + 2 * shared(state)
    with pytest.raises(UserError, match=r"holds no adapters: those of a run with step.lora.rank above 0"):
        convert(plain[0], tmp_path / "none", form="peft")
    with pytest.raises(UserError, match=r"is no training run's checkpoint"):
        convert(tiny_path(), tmp_path / "none", form="peft")
    with pytest.raises(UserError, match=r"cannot be merged into adapters alone"):
        convert(out, tmp_path / "none", form="peft", adapter=tmp_path / "adapter")
    assert not (tmp_path / "none").exists()


def shared(state) -> int:
    """Numbers that are written more than once: A of q, k and v thrice, of gate and up twice."""
    return 2 * state.trained["text.layers.qkv.lora_a"].size + state.trained["text.layers.gate_up.lora_a"].size


def test_what_is_wrong_with_a_run(plain, adapted, tmp_path):
    out, trainer, _ = plain
    alone = shutil.copytree(out / "checkpoints" / "3", tmp_path / "far" / "away" / "3")
    with pytest.raises(UserError, match=r"no config.json in .*model"):
        load(alone)
    shutil.copytree(out / "model", alone, dirs_exist_ok=True)  # beside the weights will do
    assert load(alone).config.text == trainer.model.text
    larger = dataclasses.replace(trainer.model, text=dataclasses.replace(trainer.model.text, intermediate_size=256))
    with pytest.raises(UserError, match=r"parameter text.layers.(down|gate_up) in .* has shape .*use its own config.json"):
        load_params(out / "checkpoints" / "3", larger)
    tied = dataclasses.replace(trainer.model, text=dataclasses.replace(trainer.model.text, tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"holds, against its config.json, parameter text.head"):
        load_params(out / "checkpoints" / "3", tied)
    moved = shutil.copytree(adapted[0] / "checkpoints" / "3", tmp_path / "a" / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"holds adapters, and .*config.json does not say how they are scaled"):
        load_params(moved, trainer.model)
    for file in (alone / "trained").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load(alone)


def test_the_last_checkpoints_are_kept_and_every_so_many(plain, tmp_path):
    _, _, state = plain
    checkpoints = Checkpoints.open(tmp_path, CheckpointConfig(keep=2, keep_every=3))
    for step in range(1, 9):
        checkpoints.save(step, state, {})
    checkpoints.close()
    assert sorted(int(each.name) for each in tmp_path.iterdir()) == [3, 6, 7, 8]


def test_a_model_of_random_weights_is_described(tmp_path):
    model = read_config(tiny_path())
    describe(tmp_path, model, None, tiny_path(), "bfloat16")
    assert dataclasses.replace(read_config(tmp_path / "model"), name=model.name) == model
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
