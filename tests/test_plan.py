"""Plans: names of chips, the compiler's messages, what programs send, presets. What takes a compiler for TPUs is in test_plan_aot.py."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svlm_jax import cli
from svlm_jax.configs import recipes
from svlm_jax.configs.recipes import PRESETS, ROWS, TOPOLOGIES
from svlm_jax.errors import UserError
from svlm_jax.planning import compiling, serving, training, work
from svlm_jax.planning.bounds import step_bounds
from svlm_jax.planning.chips import CHIPS, parse_topology
from svlm_jax.planning.hlo import collectives
from svlm_jax.planning.run import run
from svlm_jax.training.config import resolve
from svlm_jax.training.hosts import loaders
from svlm_jax.training.setup import batch_shapes


@pytest.mark.parametrize(
    ("text", "count", "name", "told"),
    [
        ("v5p-128", 64, "v5p:4x4x4", "64 v5p chips, 4 x 4 x 4"),
        ("v5e-256", 256, "v5e:16x16", "256 v5e chips, 16 x 16"),
        ("v5litepod-16", 16, "v5e:4x4", "16 v5e chips, 4 x 4"),
        ("v6e-64", 64, "v6e:8x8", "64 v6e chips, 8 x 8"),
        ("v6e-1", 1, "v6e:1x1", "1 v6e chip, 1 x 1"),
        ("v5e:4x4", 16, "v5e:4x4", "16 v5e chips, 4 x 4"),
        ("V5P:2x2x1", 4, "v5p:2x2x1", "4 v5p chips, 2 x 2 x 1"),
        ("h100:8", 8, "h100:8", "8 h100 chips"),
    ],
)
def test_topologies_as_people_write_them(text, count, name, told):
    found = parse_topology(text)
    assert (found.count, found.name, str(found)) == (count, name, told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9-4", "topology 'v9-4' is unknown: write v5e, v5p, v6e, h100 with a shape or a number"),
        ("v5e", "is unknown"),
        ("v5p-129", "is no slice that there is: v5p-8, v5p-16"),
        ("v5e:4x4x4", "v5e chips are wired in 2 axes, such as v5e:8x8"),
        ("v5e:0x4", "has no chips"),
        ("h100:16", "one host of h100s is planned for"),
    ],
)
def test_topologies_that_there_are_not(text, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (28.92G) "
            "exceeds available HBM (15.75G). HLO module: jit_step.",
            (28.92, 15.75),
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 45.30G of 31.25G hbm. Exceeded by 14G.",
            (45.3, 31.25),
        ),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_the_compilers_words_for_too_little_memory(message, found):
    told = compiling.out_of_memory(message)
    assert told is None if found is None else np.allclose(np.array(told) / 2**30, found)


HLO = """HloModule jit_step, is_scheduled=true

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%scatter (input: f32[8,100]) -> f32[2,100] {
  %all-reduce.1 = f32[8,100]{1,0} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
}

%all-reduce-scatter.2 (input: f32[8,100]) -> f32[2,100] {
  %all-reduce.2 = f32[8,100]{1,0:T(8,128)} all-reduce(%input), channel_id=6, replica_groups=[1,4]<=[4], to_apply=%add
}

%taken (p: f32[8]) -> f32[8] {
  %all-to-all.1 = f32[400]{0} all-to-all(%p), channel_id=9, replica_groups={{0,1,2,3}}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gather = bf16[1,4000]{1,0} all-gather(%w), channel_id=3, replica_groups=mesh['data'=1,'fsdp'=4,'tensor'=1] {'fsdp'}, dimensions={1}
  %piece = bf16[1,4000]{1,0} all-gather(%w), channel_id=3, replica_groups=mesh['data'=1,'fsdp'=4,'tensor'=1] {'fsdp'}, dimensions={1}
  %alone = f32[77] all-reduce(%w), channel_id=4, replica_groups=mesh['data'=1,'fsdp'=4] {'data'}, to_apply=%add
  %fusion.1 = f32[2,100]{1,0} fusion(%gather), kind=kCustom, calls=%all-reduce-scatter.2
  %maybe = f32[8] conditional(%index, %p, %p), branch_computations={%taken, %not_taken}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %start = (bf16[10]{0}, bf16[40]{0}) all-gather-start(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %done = bf16[40]{0} all-gather-done(%start)
  %begin = ((f32[400]{0}), f32[100]{0}) reduce-scatter-start(%p), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %end = f32[100]{0} reduce-scatter-done(%begin)
  %fusion.2 = f32[2,100]{1,0} fusion(%p), kind=kLoop, calls=%scatter
  %while.1 = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body
}
"""


def test_what_a_program_sends():
    found = {one.kind: one for one in collectives(HLO, 4)}
    assert found["all-gather"].count == 29 and found["all-gather"].moved == 3 / 4 * (28 * 8000 + 80)
    assert found["all-reduce"].count == 1 and found["all-reduce"].moved == 2 * 3 / 4 * 3200
    assert found["reduce-scatter"].count == 29 and found["reduce-scatter"].moved == 28 * 3 / 4 * 3200 + 3 / 4 * 1600
    assert found["all-to-all"].count == 1 and found["all-to-all"].moved == 3 / 4 * 1600  # behind a condition: once
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}


def test_a_loop_of_this_compiler_is_counted_by_its_turns():
    """Of the compiler that is here, which states how often a loop turns: through a real program's text, with one device in a group."""

    def loop(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: x @ x, x)

    text = jax.jit(loop).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32)).compile().as_text()
    marked = text.replace(" dot(", " all-reduce(")
    assert marked != text
    assert [one.count for one in collectives(marked, 2)] == [7]


def test_the_longest_of_three_binds():
    found = step_bounds(CHIPS["v5e"], 2 * 197e12, 819e9, 100e9, 197e12)
    assert (found.compute, found.memory, found.links) == (2, 1, 0.5) and found.by == "compute" and found.mfu == 0.5
    assert step_bounds(CHIPS["v5e"], 197e12, 819e9, 800e9, 197e12).by == "links"


def plan(monkeypatch, capsys, *words, compiled=None) -> tuple[int, str]:
    """`svlm plan` of the tiny preset, for the devices that are here."""
    monkeypatch.setattr(compiling, "devices", lambda topology: jax.devices()[: topology.count])
    if compiled:
        monkeypatch.setattr(compiling, "compiled", compiled)
    code = cli.run(["plan", "sft_tiny", "--topology", "v6e:1x1", *words])
    return code, capsys.readouterr().out


def test_a_plan_of_the_tiny_preset(monkeypatch, capsys, tmp_path):
    file = tmp_path / "plan.json"
    code, told = plan(monkeypatch, capsys, "--json", str(file), "remat=full", "attention=xla")
    assert code == 0, told
    assert "sft_tiny on 1 v6e chip, 1 x 1, 1 host: one chip" in told and "fits: in all" in told and "nothing is sent" in told
    assert re.search(r"\n  20 steps, at least +0\.0 h   0\.0 chip-days\n", told)
    found = json.loads(file.read_text())
    assert found["command"] == "svlm plan sft_tiny --topology=v6e:1x1 remat=full attention=xla"
    state = training.make_trainer(resolve("sft_tiny", []), training.model_of(resolve("sft_tiny", [])), one_mesh(), "cpu").abstract_state()
    assert found["bytes"]["trained"] == sum(leaf.size * 4 for leaf in state.trained.values())
    assert found["bytes"]["moments"] > 2 * found["bytes"]["trained"]  # two of them, and a count
    assert found["operations"]["decoder"] > 0 and found["compiler"]["operations"] > 0 and found["remat"] == "full"


def one_mesh():
    from svlm_jax.sharding import make_mesh

    return make_mesh()


def test_a_plan_of_a_stream(monkeypatch, capsys, tmp_path):
    file = tmp_path / "plan.json"
    small = serving.stream_spec
    monkeypatch.setattr(serving, "stream_spec", lambda model, config: small(model, config, height=56, width=56))
    monkeypatch.setattr(compiling, "devices", lambda topology: jax.devices()[: topology.count])
    code = cli.run(["plan", "tiny", "--serve", "--topology", "v6e-1", "--json", str(file)])
    told, found = capsys.readouterr().out, json.loads(file.read_text())
    assert code == 0 and found["fits"] and "1 stream of 56x56" in told
    assert [program["name"] for program in found["programs"]] == ["open_stream", "ingest", "decode", "evict"]
    assert all(program["memory"]["arguments"] > 0 for program in found["programs"])
    assert found["floor_ms"]["round"] > found["floor_ms"]["decode_step"] > 0


def test_flags_that_do_not_go_together(monkeypatch):
    for words, message in (
        (["sft_tiny"], "--topology is missing"),
        (["sft_tiny", "--topology", "v6e-1", "--streams", "2"], "--streams goes with --serve"),
        (["7b", "--topology", "v6e-1", "--serve", "steps=3"], "steps=3: settings are those of a preset"),
    ):
        with pytest.raises(UserError, match=message):
            run(cli.make_parser("plan").parse_args(["plan", *words]))


def test_what_recipes_say_is_what_was_planned():
    """The figures in the docstring of configs/recipes.py are those of the records in benchmarks/."""
    records = sorted((Path(__file__).parent.parent / "benchmarks").glob("plan_*.json"))
    assert records
    for record in records:
        found = json.loads(record.read_text())
        needed, available = (found["bytes"][name] / 1e9 for name in ("needed", "available"))
        bounds = found["bounds_seconds"]
        seconds = max(bounds[name] for name in ("compute", "memory", "links"))
        line = f"{needed:.1f} of {available:.1f} GB    {seconds:.1f} s, {100 * bounds['mfu']:.0f}%"
        assert any(record.name in told and line in told for told in (recipes.__doc__ or "").splitlines()), f"{record.name}: {line}"
        name = found["command"].split()[2]
        config = resolve(name, [word for word in found["command"].split()[3:] if not word.startswith("-")])
        assert found["fits"] and (found["remat"], found["accumulate"]) == (config.remat, config.step.accumulate)


def test_the_cost_that_is_told_is_that_of_the_plans():
    root = Path(__file__).parent.parent
    told, totals = (root / "docs" / "training.md").read_text(), np.zeros(3)
    for stage in ("stage1", "stage2"):
        found = json.loads((root / f"benchmarks/plan_{stage}_7b_h100x8.json").read_text())
        steps, work = resolve(f"{stage}_7b_h100x8", []).steps, sum(found["operations"].values())
        bound = max(found["bounds_seconds"][name] for name in ("compute", "memory", "links"))
        days = np.array([bound * found["chips"], work / (0.47 * 989e12), work / 989e12]) * steps / 86_400
        assert f"| {steps:,} | {work:.2e} | {days[0]:.1f} | {days[1]:.1f} |" in told
        totals += days
    assert f"| both | 3,108 | | {totals[0]:.1f} | {totals[1]:.1f} |" in told
    assert f"about 128 H100-days; by this count that is an MFU of {100 * totals[2] / 128:.0f}% at most" in told


def test_too_little_memory_is_told_with_what_to_change(monkeypatch, capsys, tmp_path):
    def refuse(lowered, platform):
        raise compiling.DoesNotFit(45 << 30, 16 << 30)

    file = tmp_path / "plan.json"
    code, told = plan(monkeypatch, capsys, "--json", str(file), "attention=xla", compiled=refuse)
    assert code == 1 and "does not fit: needs 48.3 GB of 17.2 GB" in told and "change: shorter rows" in told
    assert json.loads(file.read_text())["fits"] is False


def planned(overrides: list[str], memory: compiling.Memory | None, needed: int, available: int) -> training.Planned:
    """Of stage 1 on 256 v5e chips, with numbers that no compiler gave."""
    config = resolve("stage1_7b_v5e_256", overrides)
    trainer = trainer_of(config)
    todo = work.work(trainer, batch_shapes(config.data, trainer.model))
    parts = {"trained": 10**9, "moments": 2 * 10**9, "frozen": 10**7, "batch": 10**8}
    bounds = step_bounds(CHIPS["v5e"], 1.0, 1.0, 1.0, 1.0)
    return training.Planned(
        parse_topology("v5e-256"), trainer, config, 64, parts, todo, (), 1.0, memory, needed, available, (), {}, bounds
    )  # fmt: skip


def test_a_preset_says_which_change_helps_most():
    told = training.suggestions(planned(["remat=products", "step.accumulate=1"], None, 120 << 30, 16 << 30))
    assert told[0].startswith("remat=full (about 113.9 GB less)"), told
    assert any(line.startswith("step.accumulate=2, one row of each chip at a time (about 61.1 GB") for line in told), told
    assert any(line.startswith("mesh.sequence=2") for line in told) and told[-1].startswith("shorter rows")
    room = planned([], compiling.Memory(1, 1, 1, 1), 10**9, 95 << 30)
    assert training.suggestions(room) == ["there is room for remat=gate_up, which keeps 13.5 GB more and computes less again"]
    assert training.suggestions(dataclasses.replace(room, needed=90 << 30)) == []


def trainer_of(config):
    """The trainer on an abstract mesh: shapes alone."""
    sizes = config.mesh.sizes(256)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return training.make_trainer(dataclasses.replace(config, attention="xla"), training.model_of(config), mesh, "tpu")


def test_what_is_executed_depends_on_what_is_kept():
    done = {}
    for remat in ("nothing", "gate_up", "full"):
        config = resolve("stage1_7b_v5e_256", [f"remat={remat}"])
        trainer = trainer_of(config)
        done[remat] = work.work(trainer, batch_shapes(config.data, trainer.model))
    assert done["nothing"].model == done["full"].model
    parts = done["full"].model
    again = (done["full"].executed - done["nothing"].executed) * 256
    np.testing.assert_allclose(again, parts.decoder / 3 + parts.attention / 3)
    assert 0.5 < (done["gate_up"].executed - done["nothing"].executed) * 256 / (parts.decoder / 3) < 0.65
    # 6.53 billion weights in products of the decoder, three products each, of 512 full rows
    np.testing.assert_allclose(parts.decoder, 6 * 6.525e9 * 512 * 20_480, rtol=1e-3)
    assert parts.vision > 0 and parts.head < 0.02 * parts.decoder


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_whole(name):
    config, topology = resolve(name, []), parse_topology(TOPOLOGIES[name])
    sizes = config.mesh.sizes(topology.count)
    assert config.data.rows == ROWS and ROWS // config.step.accumulate == sizes["data"] * sizes["fsdp"]
    assert config.data.lanes % config.hosts.count == 0
    optimizer = config.step.optimizer
    assert (optimizer.learning_rate, optimizer.warmup, optimizer.final, config.step.frozen) == (1e-5, 0.03, 0.0, ("vision.*",))
    paths = [dataset.path for dataset in config.data.datasets.values()]
    assert len(paths) == 3 and len(set(paths)) == 2 if name.startswith("stage1") else len(paths) == 1
    assert config.steps == (3079 if name.startswith("stage1") else 29)


def test_presets_take_other_paths_and_unknown_ones_are_told():
    config = resolve("stage2_3b_v6e_64", ["data.datasets.clips.path=/mnt/clips.jsonl", "weights=/mnt/stage1"])
    assert config.data.datasets["clips"].path == "/mnt/clips.jsonl" and config.weights == "/mnt/stage1"
    with pytest.raises(UserError, match="stage1_7b_v5e_256"):
        resolve("stage1_7b_v4", [])


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of another process, as far as a mesh looks at it."""

    id: int
    process_index: int
    platform: str = "cpu"


def fake_mesh(owners: list[list[int]], data: int, fsdp: int) -> jax.sharding.Mesh:
    """Owners by row shard and by shard of its tokens."""
    flat = [Device(i, owner) for i, owner in enumerate(np.ravel(owners).tolist())]
    devices = np.array(flat, object).reshape(data, fsdp, len(owners[0]), 1)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "sequence", "tensor"))


def test_processes_load_the_rows_that_their_devices_hold():
    """As on pods: a process's rows are no neighbours, and two processes may hold the same."""
    scattered = fake_mesh([[0], [0], [1], [1], [1], [1], [0], [0]], 1, 8)
    assert loaders(scattered) == [({0}, [0, 1, 6, 7]), ({1}, [2, 3, 4, 5])]
    together = fake_mesh([[0, 1], [2, 3], [0, 1], [2, 3]], 2, 2)
    assert loaders(together) == [({0, 1}, [0, 2]), ({2, 3}, [1, 3])]
    for owners in ([[0], [0], [1]], [[0, 1], [1, 2], [2, 0]]):
        with pytest.raises(UserError, match="is not shared evenly"):
            loaders(fake_mesh(owners, 1, 3))
