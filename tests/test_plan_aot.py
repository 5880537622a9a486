"""`svlm plan` with the compiler for TPUs: 7B widths, few layers, a pod's mesh; needs the libtpu package."""

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

ROW = ["data.lanes=4", "data.rows=8", "step.accumulate=1", "data.shape.tokens=4096", "data.shape.bins=4", "remat=full"]


def cut() -> models.ModelConfig:
    """7B widths, two layers and two blocks."""
    model = models.qwen2_5_vl_7b()
    text = dataclasses.replace(model.text, num_hidden_layers=2)
    return dataclasses.replace(model, text=text, vision=dataclasses.replace(model.vision, depth=2, fullatt_block_indexes=(1,)))


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
    assert parts <= found.memory.arguments < 1.02 * parts  # nothing is padded, nothing is kept twice
    assert found.memory.results < 0.01 * parts  # the donated state is written in place


def test_weights_are_gathered_a_layer_at_a_time_and_gradients_scattered():
    found = planned()
    layer = 2 * sum(leaf.size for path, leaf in found.trainer.abstract_state().trained.items() if path.startswith("text.layers."))
    sent = {one.kind: one.moved for one in found.sent}
    ends = 2 * 2 * 152_064 * 3584
    # Both passes gather each layer, and embedding and head are gathered once; the small vision tower comes on top
    assert sent["all-gather"] == pytest.approx(7 / 8 * (2 * layer + ends), rel=0.05)
    # Reduced everywhere, the layers' gradients alone would be twice their bytes
    assert sent.get("all-reduce", 0) < 0.1 * 2 * 7 / 8 * layer, sent


def test_a_model_that_does_not_fit_says_so_in_a_line(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert cli.run(["plan", "stage1_7b_v5e_256", "--topology", "v5e:2x2", "--mesh", "fsdp=-1", "--json", str(file), *ROW, "remat=nothing"]) == 1
    told = capsys.readouterr().out
    assert "does not fit: needs" in told and "of 16.9 GB" in told and "change: " in told
    found = json.loads(file.read_text())
    assert found["bytes"]["needed"] > 16e9 and found["versions"]["libtpu"] and not found["fits"]
