"""The benchmark of the streaming loop: a whole small run on this machine, and its parts on made-up input."""

import argparse
import dataclasses
import importlib
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small

from svlm_jax import demo
from svlm_jax.bench import kernels, profile, report, stream, timeline
from svlm_jax.bench.ceilings import Ceilings
from svlm_jax.bench.floors import floors
from svlm_jax.commands import bench as command
from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import qwen2_5_vl_7b, tiny
from svlm_jax.errors import UserError
from svlm_jax.streaming.engine import make_spec
from svlm_jax.tokenizer import Tokenizer

SMALL = [
    "--height",
    "56",
    "--width",
    "56",
    "--tokens",
    "4",
    "--vision-window",
    "2",
    "--text-window",
    "2",
    "--text-sink",
    "16",
    "--text-sliding",
    "16",
]
PERCENTILES = {"p50": float, "p99": float}
DEVICE_STAGES = ("vision", "prefill", "decode_step", "evict", "other", "decode", "device_round", "device_gaps")
FIELDS = {
    "date": str,
    "device": str,
    "commit": str,
    "versions": {"python": str, "jax": str, "jaxlib": str, "flax": str, "numpy": str, "av": str},
    "model": str,
    "weights": str,
    "kv": str,
    "mesh": {"data": int, "tensor": int},
    "mode": str,
    "positions": str,
    "fps": float,
    "chunk_seconds": float,
    "height": int,
    "width": int,
    "streams": int,
    "rounds": int,
    "vision_window": int,
    "text_window": int,
    "text_sink": int,
    "text_sliding": int,
    "text_refresh": int,
    "tokens_per_round": float,
    "turns_at_budget": float,
    "cached_tokens": float,
    "round_ms": PERCENTILES,
    "pipelined_round_ms": float,
    "stages_ms": {name: PERCENTILES for name in ("read_video", "host", "enqueue_decode", *DEVICE_STAGES)},
    "parts_ms": dict,
    "first_word_ms": PERCENTILES,
    "compilations_after_warmup": int,
    "device_memory_growth_bytes": int,
    "host_memory_growth": float,
    "late_over_early": float,
    "ceilings": {"copy_tbps": float, "matmul_tflops": float},
    "floor_ms": {name: float for name in ("vision", "prefill", "decode_step", "first_word", "round")},
}


def check_types(value, expected, name="result"):
    if isinstance(expected, dict):
        assert set(value) == set(expected), name
        for key, inner in expected.items():
            check_types(value[key], inner, f"{name}.{key}")
    else:
        assert type(value) is expected, f"{name}: {value!r}"
        assert expected is not float or math.isfinite(value), f"{name}: {value!r}"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A run of 12 rounds: the JSON file's object, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    arguments = [*SMALL, "--weights", "f32", "--rounds", "12", "--profile-rounds", "3", "--pipelined-rounds", "3", "--json", str(path)]
    assert stream.main(arguments) == 0
    return json.loads(path.read_text())


def test_every_field_is_there(outcome):
    check_types(outcome, FIELDS)


def test_a_round_is_measured(outcome):
    assert outcome["tokens_per_round"] == 4
    assert outcome["turns_at_budget"] == 1
    assert outcome["compilations_after_warmup"] == 0
    assert outcome["device_memory_growth_bytes"] == 0
    assert 0 < outcome["first_word_ms"]["p50"] < outcome["round_ms"]["p50"]
    assert outcome["stages_ms"]["host"]["p50"] < outcome["round_ms"]["p50"]
    assert outcome["stages_ms"]["read_video"]["p50"] > 0
    # two rounds of 4 clip tokens each, a full previous text, and the prompts around them
    assert 60 < outcome["cached_tokens"] < 200


def test_stages_come_from_the_device(outcome):
    stages = {name: outcome["stages_ms"][name]["p50"] for name in DEVICE_STAGES}
    for name in ("vision", "prefill", "evict", "decode_step"):
        assert stages[name] > 0, name
    assert stages["decode"] == pytest.approx(3 * stages["decode_step"], rel=0.01)
    # What no stage claims is time in which nothing ran, however busy the machine: next to no operation is without a stage
    assert stages["other"] < stages["device_gaps"] + 0.1 * stages["device_round"]
    assert {"vision/mlp", "prefill/ring_attention", "decode_step/ring_attention", "decode_step/head"} <= set(outcome["parts_ms"])


def test_floors_are_positive(outcome):
    assert all(value > 0 for value in outcome["floor_ms"].values())
    assert all(value > 0 for value in outcome["ceilings"].values())


def test_table_reads_well(outcome):
    lines = report.table(outcome).splitlines()
    assert any(line.startswith("decode_step") and line.endswith("%") for line in lines)
    assert lines[-1].startswith("faster than real time: a round of 1000 ms of video takes")
    unmeasured = outcome | {"stages_ms": outcome["stages_ms"] | {"vision": None}, "parts_ms": {}, "pipelined_round_ms": None}
    assert "not measured" in report.table(unmeasured)
    slow = outcome | {"round_ms": {"p50": 1500.0, "p99": 1600.0}}
    assert report.table(slow).splitlines()[-1].startswith("NOT faster than real time")


HLO = """HloModule jit_ingest, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_computation (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %exp.1 = f32[8]{0} exponential(%param_0), metadata={op_name="jit(ingest)/vision/full_attention/exp" stack_frame_id=2}
  ROOT %copy.9 = f32[8]{0} copy(%exp.1)
}

%command_buffer (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a.1 = f32[8]{0} negate(%p), metadata={op_name="jit(ingest)/prefill/mlp/neg"}
  %a.2 = f32[8]{0} negate(%a.1), metadata={op_name="jit(ingest)/prefill/mlp/neg"}
  ROOT %a.3 = f32[8]{0} negate(%a.2), metadata={op_name="jit(ingest)/evict/neg"}
}

ENTRY %main.1 (frames: f32[8]) -> f32[8] {
  %frames = f32[8]{0} parameter(0), metadata={op_name="frames"}
  %add.1 = f32[8]{0} add(%frames, %frames), metadata={op_name="jit(ingest)/add" stack_frame_id=1}
  %fusion.1 = f32[8]{0} fusion(%add.1), kind=kLoop, calls=%fused_computation
  %copy.2 = f32[8]{0} copy(%fusion.1)
  %call.3 = f32[8]{0} call(%copy.2), to_apply=%command_buffer, metadata={op_name="jit(ingest)/call"}
  ROOT %mul.4 = f32[8]{0} multiply(%call.3, %call.3), metadata={op_name="jit(ingest)/prefill/attention/ring_attention/jit(_where)/mul"}
}
"""


def test_labels_of_a_program():
    module, labels = profile.labels(HLO)
    assert module == "jit_ingest"
    assert labels["add.1"] == ("other", "other")
    assert labels["fusion.1"] == ("vision", "full_attention")
    assert labels["call.3"] == ("prefill", "mlp")
    assert labels["mul.4"] == ("prefill", "ring_attention")
    assert "copy.2" not in labels and "frames" not in labels


# A replayed graph's kernels name no program; copies to the host are no part of a round.
GPU = """
planes { name: "/host:CPU" }
planes {
  name: "/device:GPU:0"
  stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_op" } }
  stat_metadata { key: 3 value { id: 3 name: "name" } }
  event_metadata { key: 1 value { id: 1 name: "kernel" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2H" } }
  lines { id: 7 name: "Stream #7(Compute)" EVENTS }
  lines { id: 8 name: "Stream #8(MemcpyD2H)" events { metadata_id: 2 offset_ps: 50000000 duration_ps: 1000000 } }
}
"""


def gpu_event(start: int, end: int, module: str, op: str, name: str = "") -> str:
    stats = {1: module, 2: op, 3: name}
    given = "".join(f'stats {{ metadata_id: {key} str_value: "{value}" }} ' for key, value in stats.items() if value)
    return f"events {{ metadata_id: 1 offset_ps: {start * 1000} duration_ps: {(end - start) * 1000} {given}}}\n"


def test_stages_of_a_gpu_profile():
    one = [
        (0, 10, "jit_planar", "copy", ""),
        (20, 30, "jit_ingest", "add.1", ""),
        (30, 50, "jit_ingest", "fusion.1", ""),
        (50, 60, "jit_ingest", "copy.2", ""),  # no scope: the vision kernel's before it
        (70, 100, "jit_ingest", "call.3", ""),  # the gap before it is its own
        (100, 120, "", "", ""),
        (120, 140, "jit_ingest", "new.7", "evict/relocate"),
        (150, 200, "jit_decode", "fusion.1", ""),
        (260, 300, "", "", ""),
    ]
    kernels = [(start + at, end + at, *rest) for at in (0, 1000) for start, end, *rest in one]
    text = GPU.replace("EVENTS", "".join(gpu_event(*kernel) for kernel in kernels))
    data = jax.profiler.ProfileData.from_serialized_xspace(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    events = profile.read(data)
    assert len(events) == len(kernels)
    rounds = profile.rounds(events, dict([profile.labels(HLO)]))
    assert len(rounds) == 2
    for round in rounds:
        expected = {"other": 10 + 10 + 10 + 10, "vision": 30, "prefill": 40 + 20, "evict": 20, "decode": 150}
        assert {name: 1e6 * value for name, value in round.stages.items()} == pytest.approx(expected)
        assert sum(round.stages.values()) == pytest.approx(round.total)
        assert 1e6 * round.total == pytest.approx(300)
        assert 1e6 * round.gaps == pytest.approx(10 + 10 + 10 + 60)
        assert 1e6 * round.parts["prefill/mlp"] == pytest.approx(60)


def test_kernels_of_a_command_buffer_fall_into_consecutive_stages():
    """Two kernels share the name of a copy that evicts; the stretch they stand in decides."""
    known = {"jit_ingest": {"copy.1": ("evict", "other"), "dot.2": ("vision", "mlp"), "dot.3": ("prefill", "mlp")}, "jit_decode": {}}
    names = ["copy_1", "copy_1", "nvjet", "dot_2", "nvjet", "dot_3", "copy_1", "dot_3", "copy_1"]
    events = [profile.Event(10.0 * i, 10.0 * i + 8, "jit_ingest", name, None, graph=True) for i, name in enumerate(names)]
    events.append(profile.Event(100.0, 108.0, "jit_decode", "dot_9", None, graph=True))
    (round,) = profile.rounds(events, known)
    milliseconds = {name: 1e-6 * value for name, value in {"evict": 28, "vision": 20, "prefill": 40, "decode": 8, "other": 12}.items()}
    assert round.stages == pytest.approx(milliseconds)
    assert round.total == pytest.approx(108e-6)


def test_a_loop_in_a_command_buffer_is_divided_as_its_one_recorded_step_is():
    known = {"jit_ingest": {"dot.2": ("vision", "mlp")}, "jit_decode": {"dot.3": ("decode", "mlp"), "copy.1": ("decode", "append")}}
    events = [profile.Event(0.0, 50.0, "jit_ingest", "dot_2", None)]
    steps = [("dot_3", 60, 90), ("copy_1", 90, 100), ("set_while_condition", 100, 100), ("dot_3", 400, 500)]
    events += [profile.Event(float(start), float(end), "jit_decode", name, None, graph=True) for name, start, end in steps]
    (round,) = profile.rounds(events, known)
    assert {name: 1e6 * value for name, value in round.stages.items() if value} == pytest.approx({"vision": 50, "other": 10, "decode": 440})
    assert {name: 1e6 * value for name, value in round.parts.items()} == pytest.approx(
        {"vision/mlp": 50, "decode/mlp": 440 * 130 / 140, "decode/append": 440 * 10 / 140}
    )
    assert 1e6 * round.gaps == pytest.approx(10)


def test_a_cpu_profile_of_a_real_program():
    def ingest(x):
        with jax.named_scope("vision"), jax.named_scope("mlp"):
            y = jnp.sin(x @ x)
        with jax.named_scope("prefill"):
            return jax.lax.fori_loop(0, 4, lambda _, z: jnp.tanh(z @ z), y)

    def decode(x):
        return x @ x

    first, second = jax.jit(ingest), jax.jit(decode)
    x = jnp.ones((64, 64))
    second(first(x)).block_until_ready()
    with profile.recording() as events:
        for _ in range(2):
            second(first(x)).block_until_ready()
    rounds = profile.rounds(events, dict([profile.labels(first.lower(x).compile().as_text() or "")]))
    assert len(rounds) == 2
    for round in rounds:
        assert round.stages["vision"] > 0 and round.stages["prefill"] > 0 and round.stages["decode"] > 0 and round.stages["evict"] == 0
        assert round.parts["vision/mlp"] > 0
        assert sum(round.stages.values()) == pytest.approx(round.total)


def test_floors_of_the_7b():
    """By hand: 14.14 GB of weights and 57,344 bytes a cached token; 14 TFLOP of prefill; 3.9 TFLOP of vision."""
    tokenizer = Tokenizer.load(Path(demo.__file__).with_name("tiny"))
    load = stream.Load()
    spec = make_spec(qwen2_5_vl_7b(), load.stream_config(tokenizer), tokenizer, height=560, width=1008)
    least = floors(spec, Ceilings(3.08, 798), streams=1, cached_tokens=12_500, dtype=jnp.bfloat16)
    assert least["decode_step"] == pytest.approx(4.82, rel=0.01)
    assert least["prefill"] == pytest.approx(17.6, rel=0.05)
    assert least["vision"] == pytest.approx(4.9, rel=0.03)
    assert least["round"] == pytest.approx(114, rel=0.02)
    eight = floors(spec, Ceilings(3.08, 798), streams=1, cached_tokens=12_500, dtype=jnp.bfloat16, weight_dtype=jnp.int8)
    assert eight["decode_step"] == pytest.approx(2.53, rel=0.01) and eight["vision"] == least["vision"]
    narrow = floors(
        spec, Ceilings(3.08, 798, 1596), streams=1, cached_tokens=12_500, dtype=jnp.bfloat16, weight_dtype=jnp.float8_e4m3fn, narrow=True
    )
    assert narrow["decode_step"] == eight["decode_step"] and narrow["round"] == pytest.approx(60, rel=0.03)
    slow = floors(
        spec, Ceilings(3.08, 798), streams=1, cached_tokens=12_500, dtype=jnp.bfloat16, weight_dtype=jnp.float8_e4m3fn, narrow=True
    )
    assert slow["prefill"] == pytest.approx(least["prefill"]) and slow["vision"] == pytest.approx(least["vision"])
    many = floors(spec, Ceilings(3.08, 798), streams=8, cached_tokens=12_500, dtype=jnp.bfloat16)
    assert many["vision"] == pytest.approx(8 * least["vision"])
    assert many["decode_step"] == pytest.approx(least["decode_step"] + 7 * 12_500 * 57_344 / 3.08e9)


@pytest.mark.parametrize("tied", [False, True])
def test_turns_cannot_close(tied):
    config = tiny(8)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=tied))
    params = {"text": {"embedding": jnp.ones((8, 4))} | ({} if tied else {"head": jnp.ones((4, 8))})}
    stream.never_close(config, params, 5)
    weights = params["text"]["embedding"] if tied else params["text"]["head"].T
    assert not weights[5].any() and weights.sum() == 7 * 4


def test_previous_text_fills_its_room():
    tokenizer = Tokenizer.load(Path(demo.__file__).with_name("tiny"))
    for count in (0, 31, 1023):
        used = len(tokenizer.encode_plain(stream.filler(tokenizer, count)))
        assert used <= count and used >= count - 24


def test_flags_multiply_and_results_are_a_list(tmp_path, monkeypatch, outcome):
    runs = []

    def run_load(model, load, ceilings, log, *, path):
        runs.append(load)
        return outcome | {"mode": load.mode, "fps": load.fps}

    monkeypatch.setattr(stream, "run_load", run_load)
    monkeypatch.setattr(stream, "measure", lambda **_: Ceilings(1, 1))
    monkeypatch.setattr(stream, "load_model", lambda *_: None)
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    path = tmp_path / "many.json"
    output = ["--video", "x.mp4", "--json", str(path)]
    args = parser.parse_args(["bench", "stream", *SMALL, "--mode", "streaming", "full", "--fps", "2", "4", *output])
    assert command.run(args) == 0
    assert [(run.mode, run.fps) for run in runs] == [("streaming", 2), ("streaming", 4), ("full", 2), ("full", 4)]
    assert [(one["mode"], one["fps"]) for one in json.loads(path.read_text())] == [(run.mode, run.fps) for run in runs]


def test_a_cache_that_grows_goes_on_as_if_it_had_been_larger():
    config = StreamConfig(mode="full", capacity_rounds=6, max_new_tokens=4, query="", question_capacity=0)
    large, growing = (small.engine(dataclasses.replace(config, capacity_rounds=rounds), rows=16, columns=16) for rounds in (6, 2))
    assert growing.spec.cache.slots < large.spec.cache.slots
    said = []
    for engine in (large, growing):
        engine.open(0)
        said.append([])
        for index in range(6):
            if engine is growing and index in (2, 4):
                timeline.grow(engine, index + 2)
            said[-1].append(engine.step(small.frames(engine, index), {0: (float(index), index + 1.0)}).tokens()[0])
    assert said[0] == said[1]
    jax.tree.map(lambda ours, theirs: (ours == theirs).all() or pytest.fail("the states differ"), growing.state, large.state)


def test_latency_and_memory_over_stream_time_are_drawn_from_their_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timeline, "FIRST_CAPACITY", 2)
    monkeypatch.setattr(timeline, "free_memory", lambda: 0 if len(grown) else 1 << 40)
    grown, grow = [], timeline.grow
    monkeypatch.setattr(timeline, "grow", lambda engine, capacity: grown.append(capacity) or grow(engine, capacity))
    picture, record = tmp_path / "figure.png", tmp_path / "figure.json"
    arguments = ["--weights", "f32", "--rounds", "6", "--mode", "full", "streaming", "--plot", str(picture), "--json", str(record)]
    assert stream.main([*SMALL, *arguments]) == 0
    full, streaming = json.loads(record.read_text())
    assert grown == [4] and full["timeline"]["out_of_memory"] and full["timeline"]["seconds"] == [1, 2, 3, 4]
    assert not streaming["timeline"]["out_of_memory"] and streaming["timeline"]["seconds"] == [1, 2, 3, 4, 5, 6]
    for run in (full, streaming):
        assert {len(run["timeline"][column]) for column in timeline.COLUMNS} == {len(run["timeline"]["seconds"])}
        assert min(run["timeline"]["round_ms"]) > 0 and run["device"] == "cpu" and run["command"]
    assert len(set(streaming["timeline"]["memory_bytes"])) == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["mode", "full", "streaming"] and table[1].endswith("out of memory")
    again = tmp_path / "again.svg"
    assert stream.main(["--record", str(record), "--plot", str(again)]) == 0
    assert (
        picture.read_bytes().startswith(b"\x89PNG")
        and "out of memory" in again.read_text()
        and capsys.readouterr().out.splitlines() == table
    )
    (tmp_path / "other.json").write_text("{}")
    for wrong, told in (
        (["--record", str(record)], "--record needs --plot"),
        (["--record", str(tmp_path / "other.json"), "--plot", str(again)], "has no timelines"),
        (["--record", str(record), "--plot", str(tmp_path / "figure.txt")], "cannot be written"),
    ):
        assert stream.main(wrong) == 2 and told in capsys.readouterr().err


def test_mistakes_are_one_line(capsys):
    assert stream.main(["--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds must be at least 1, not 0\n"
    with pytest.raises(UserError, match=r"x\.mp4"):
        next(stream.endless("x.mp4", stream.Load(), 0.0))


def test_commit_may_be_stated(monkeypatch):
    monkeypatch.setenv("SVLM_COMMIT", "abc")
    assert report.commit() == "abc"


def test_kernels_beside_their_floor(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())

    def run(*arguments):
        return command.run(parser.parse_args(["bench", "kernels", *arguments]))

    sizes = ("--slots", "1280", "--tokens", "1", "--layers", "2", "--kv", "off", "int8", "--rows")
    assert run(*sizes, "--json", str(tmp_path / "kernels.json")) == 0
    row, small = json.loads((tmp_path / "kernels.json").read_text())
    assert (row["kv"], small["kv"]) == ("bfloat16", "int8") and small["reference"]["relative_error"] < 0.01
    assert row["bytes"] - small["bytes"] == pytest.approx(2 * 4 * row["valid_slots"] * (256 - 132))
    assert row["slots"] == 1280 and "mosaic_gpu" not in row and "mosaic_tpu" not in row  # which do not run on a CPU
    found, held = row["reference"], row["valid_slots"]
    assert row["bytes"] == pytest.approx(2 * 128 * (2 * 4 * (held + 1) + 4 * 28))
    assert found["tbps"] == pytest.approx(row["bytes"] / found["us"] / 1e6) and found["tflops"] == pytest.approx(
        row["operations"] / found["us"] / 1e6
    )
    least = max(row["bytes"] / row["ceilings"]["copy_tbps"], row["operations"] / row["ceilings"]["matmul_tflops"]) / 1e6
    assert found["of_floor"] == pytest.approx(least / found["us"]) and found["relative_error"] < 0.01
    assert "unsupported" in row["cudnn"]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5 and "XLA" in table[1] and "cudnn" in table[2] and "int8" in table[3]
    for flag, value in (("--slots", "1000"), ("--tokens", "0"), ("--streams", "0"), ("--layers", "0"), ("--rows", "0")):
        with pytest.raises(UserError, match=f"{flag} must be .* not {value}"):
            run(flag, value)


def test_products_beside_xla(monkeypatch):
    from svlm_jax.kernels.products import bench

    monkeypatch.setattr(bench, "WEIGHTS", {"small": (256, 384)})
    monkeypatch.setattr(bench, "CHAIN_BYTES", 1)
    record = kernels.rated(bench.measure("small", rows=3, kind="fp8"), Ceilings(1, 1))
    assert (record["weight"], record["rows"], record["inputs"], record["outputs"], record["kind"]) == ("small", 3, 256, 384, "fp8")
    assert "mosaic_gpu" not in record and "tiles" not in record  # which do not run on a CPU
    assert record["operations"] == 2 * 3 * 256 * 384 and 256 * 384 < record["bytes"] < 256 * 384 + 10_000
    found, wide = record["reference"], record["XLA bf16"]
    assert found["relative_error"] < 0.01 and found["tbps"] == pytest.approx(record["bytes"] / found["us"] / 1e6)
    assert wide["tbps"] == pytest.approx(2 * 256 * 384 / wide["us"] / 1e6)
    lines = kernels.rows(record)
    assert len(lines) == 2 and "XLA" in lines[0] and "XLA bf16" in lines[1] and all(line.split()[:2] == ["small", "3"] for line in lines)
    assert len(lines[0].split("XLA")[0]) == len(kernels.heading(record)) + 2


def test_products_of_rows_in_eight_bits_beside_xla(monkeypatch):
    from svlm_jax.kernels.products import bench

    monkeypatch.setattr(bench, "WEIGHTS", {"small": (256, 384)})
    monkeypatch.setattr(bench, "CHAIN_BYTES", 1)
    many, few = (bench.measure("small", rows=rows, kind="fp8_products") for rows in (40, 2))
    assert many["narrow"] and not few["narrow"]  # of which the rows stay as they are
    assert many["fp8"]["relative_error"] < 0.01 and few["fp8"].keys() == {"unsupported"}
    slow, fast = (kernels.rated(many, Ceilings(1e9, 1.0, fp8)) for fp8 in (None, 2.0))
    assert fast["floor_us"] == pytest.approx(slow["floor_us"] / 2) and slow["floor_us"] == pytest.approx(2 * 40 * 256 * 384 / 1e6)
    assert kernels.rated(few, Ceilings(1e9, 1.0, 2.0))["floor_us"] == pytest.approx(2 * 2 * 256 * 384 / 1e6)


def test_cases_of_a_gpu_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import h100

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    for _, (first, *rest) in h100.CASES.values():  # each is a command that there is
        if first.endswith(".py"):
            importlib.import_module(first.removesuffix(".py")).parser().parse_args([*rest, "--json", "x.json"])
        else:
            parser.parse_args(["bench", first, *rest, "--json", "x.json"])
    clock, ran = [0.0], []

    def run(name, seconds):
        ran.append((name, round(seconds)))
        clock[0] += 100.0
        return [] if name == "b" and len(ran) < 3 else [{"commit": "abc"}]

    monkeypatch.setenv("SVLM_COMMIT", "abc")
    monkeypatch.setattr(h100.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(h100, "run", run)
    monkeypatch.setattr(h100, "CASES", {"a": (90, ()), "b": (90, ()), "long": (999, ()), "c": (90, ())})
    out = tmp_path / "cases.json"
    assert h100.main(["--minutes", "5", "--out", str(out)]) == 1
    assert ran == [("a", 300), ("b", 200), ("c", 100)] and "not yet measured: b, long" in capsys.readouterr().out
    assert h100.main(["--minutes", "17", "--out", str(out)]) == 1  # `b` took what `long` needs
    assert [name for name, _ in ran[3:]] == ["b"] and set(json.loads(out.read_text())) == {"a", "b", "c"}
    assert h100.main(["--minutes", "17", "--out", str(out)]) == 0
    monkeypatch.setenv("SVLM_COMMIT", "def")  # of another commit: measured anew
    assert h100.main(["--minutes", "2", "--out", str(out), "--case", "a"]) == 0 and ran[-1][0] == "a"


def test_a_case_ends_with_all_that_it_started(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import h100

    monkeypatch.setattr(h100, "RECORD", tmp_path / "cases.json")
    for name, body in {
        "good": 'open(sys.argv[2], "w").write(\'{"commit": "abc"}\')',
        "bad": "sys.exit(3)",
        "slow": 'child = subprocess.Popen(["sleep", "600"]); open("FILE", "w").write(str(child.pid)); child.wait()'.replace(
            "FILE", str(tmp_path / "pid")
        ),
    }.items():
        (tmp_path / f"{name}.py").write_text(f"import subprocess, sys\n{body}\n")
        monkeypatch.setitem(h100.CASES, name, (1, (f"{name}.py",)))
    assert h100.run("good", 60) == [{"commit": "abc"}]
    assert h100.run("bad", 60) == [] and "bad: exit status 3" in capfd.readouterr().err
    assert h100.run("slow", 2) == [] and "slow: not done after 2 s" in capfd.readouterr().err
    if (tmp_path / "pid").exists():  # a machine with much to do may not have come so far
        state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
        end = time.monotonic() + 60
        while state.exists() and state.read_text().split()[2] != "Z":  # gone, or waited for by nobody
            assert time.monotonic() < end, "what a case started outlives it"
            time.sleep(0.01)
