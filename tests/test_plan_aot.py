"""`svlm plan` with the compiler for TPUs: a small model on a slice of two hosts; needs the libtpu package."""

import dataclasses
import functools
import json

import pytest

pytest.importorskip("libtpu", reason="compiling for TPUs takes the compiler of the libtpu package")

from svlm_jax import cli
from svlm_jax.configs import models
from svlm_jax.planning import training
from svlm_jax.planning.chips import parse_topology
from svlm_jax.training.config import resolve

ROW = ["data.lanes=4", "data.rows=8", "step.accumulate=1", "data.shape.tokens=640", "data.shape.bins=2", "remat=full"]


def cut() -> models.ModelConfig:
    """The 7B model made narrow: two layers, one block; what fsdp leaves of a width is whole tiles as in the presets."""
    model = models.qwen2_5_vl_7b()
    narrow = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 4096}
    vision = dataclasses.replace(model.vision, depth=1, fullatt_block_indexes=(0,), out_hidden_size=1024)
    return dataclasses.replace(model, text=dataclasses.replace(model.text, **narrow), vision=vision)


@functools.cache
def planned() -> training.Planned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "model_of", lambda config: cut())
        return training.plan_training(resolve("stage1_7b_v5e_256", [*ROW, "mesh.data=1", "mesh.fsdp=8"]), parse_topology("v5e-8"))


def test_a_step_on_a_slice_of_two_hosts():
    found = planned()
    assert found.fits and found.hosts == 2 and found.trainer.recipe.attention.name == "splash"
    assert found.memory is not None
    parts = sum(found.parts.values())
    assert parts <= found.memory.arguments < 1.05 * parts  # little is padded, nothing is kept twice
    assert found.memory.results < 0.01 * parts  # the donated state is written in place


def test_weights_are_gathered_a_layer_at_a_time_and_gradients_scattered():
    found = planned()
    state = found.trainer.abstract_state()
    layers, once = 0, 0  # bytes in bfloat16, as they are gathered
    for path, leaf in (state.trained | state.frozen).items():
        if "fsdp" in leaf.sharding.spec:
            layers += 2 * leaf.size * path.startswith("text.layers.")
            once += 2 * leaf.size * (not path.startswith("text.layers."))
    sent = {one.kind: one.moved for one in found.sent}
    # Both passes gather each layer; embedding, head and vision tower are gathered once
    assert sent["all-gather"] == pytest.approx(7 / 8 * (2 * layers + once), rel=0.05)
    # Reduced everywhere, the layers' gradients alone would be twice their bytes
    assert sent.get("all-reduce", 0) < 0.1 * 2 * 7 / 8 * layers, sent


def test_a_model_that_does_not_fit_says_so_in_a_line(capsys, tmp_path):
    file = tmp_path / "plan.json"
    long = ["data.shape.tokens=8192", "remat=nothing", "--json", str(file)]
    assert cli.run(["plan", "stage1_7b_v5e_256", "--topology", "v5e:2x2", "--mesh", "fsdp=-1", *ROW, *long]) == 1
    told = capsys.readouterr().out
    assert "does not fit: needs" in told and "of 16.9 GB" in told and "change: " in told
    found = json.loads(file.read_text())
    assert found["bytes"]["needed"] > 16e9 and found["versions"]["libtpu"] and not found["fits"]
