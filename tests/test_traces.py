"""The recorded behaviour of the original system, reproduced: see `replay_trace` and `replay_forward`."""

import json

import oracle
import pytest
import replay_forward
import replay_trace
from contract import replay

from svlm_jax.errors import UserError

TRACES = sorted(path.name for path in (oracle.DATA / "streaming").glob("*.json.gz"))


@pytest.mark.parametrize("name", TRACES)
def test_trace_is_reproduced(name):
    trace = oracle.read_json(oracle.DATA / "streaming" / name)
    recorded = trace.pop("rounds")
    replay_trace.compare(replay_trace.produce(trace), recorded)


@pytest.mark.parametrize("name", TRACES)
def test_contract_agrees_with_the_trace(name):
    assert replay(oracle.read_json(oracle.DATA / "streaming" / name)) >= 14


@pytest.mark.parametrize("case", oracle.read_json(oracle.DATA / "plain_forward.json.gz"), ids=lambda case: case["name"])
def test_forward_is_reproduced(case):
    given = {key: case[key] for key in replay_forward.GIVEN if key in case}
    replay_forward.compare(replay_forward.produce(given), case)
    assert replay_forward.check_greedy(given) >= 1


def test_texts_that_follow_each_other_are_one_text():
    """Of the parts of a prompt, as of a trace's: where it is cut says nothing."""
    case = oracle.read_json(oracle.DATA / "plain_forward.json.gz")[0]
    config, _ = oracle.make_model({**case, "config": case["config"] | {"num_hidden_layers": 1}})
    whole, _ = replay_forward.prompt_of(case | {"parts": ["<|im_start|>assistant\n\nWell", ["image", 1, 28, 28], "done"]}, config)
    cut, _ = replay_forward.prompt_of(case | {"parts": ["<|im_start|>assist", "ant\n", "\nWell", ["image", 1, 28, 28], "do", "ne", ""]}, config)
    assert cut.tokens.tolist() == whole.tokens.tolist() and cut.positions.tolist() == whole.positions.tolist()


@pytest.mark.parametrize(
    ("changes", "rounds", "frames", "mode", "positions"),
    [
        ({"duration": 9, "chunk_duration": 2, "fps": 1}, 4, 2, "streaming", "contiguous"),
        ({"duration": 0.3, "chunk_duration": 0.1, "fps": 29.97}, 3, 2, "streaming", "contiguous"),
        ({"duration": 7, "chunk_duration": 0.5, "fps": 7, "pos_mode": "append"}, 14, 3, "streaming", "append"),
        ({"recompute": True, "pos_mode": "append"}, 24, 2, "recompute", "contiguous"),
        ({"recompute": None, "pos_mode": None}, 24, 2, "streaming", "contiguous"),
    ],
)
def test_a_trace_may_have_any_rate_and_lack_what_only_informs(changes, rounds, frames, mode, positions):
    case = oracle.read_json(oracle.DATA / "streaming" / "equal_windows.json.gz")["case"] | changes
    case = {key: value for key, value in case.items() if value is not None}
    stream = replay_trace.stream_config(case)
    assert (replay_trace.count_rounds(case), stream.frames_per_round, stream.mode, stream.positions) == (rounds, frames, mode, positions)
    assert replay_trace.frames(case, 0).shape == (frames, 3, case["height"], case["width"])


BAD = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "the trace has no case, config, candidate_token_ids"),
    "no settings": ({"case": {"fps": 2}}, "case has no chunk_duration, duration"),
    "a word for a number": ({"fps": "2"}, "case has fps = '2', which must be a positive number"),
    "no frame a round": ({"fps": 0.5}, "a round has no frame"),
    "odd pixels": ({"height": 85}, "frames of 85x140 pixels: both sides must be multiples of 28"),
    "another family": ({"family": "qwen9"}, "model_type 'qwen9', which is not supported"),
    "no such token": ({"candidate_token_ids": [200_000]}, "candidate_token_ids must be a list of ids below the vocab_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_trace_is_told_in_one_line(case, tmp_path, monkeypatch, capsys):
    what, told = BAD[case]
    if isinstance(what, dict):
        trace = oracle.read_json(oracle.DATA / "streaming" / "equal_windows.json.gz")
        what = json.dumps({**trace, **what} if what.keys() <= trace.keys() else {**trace, "case": trace["case"] | what})
    path = tmp_path / "bad.json"
    path.write_text(what)
    monkeypatch.setattr("sys.argv", ["replay_trace.py", str(path), str(tmp_path / "none.json"), "--out", str(tmp_path / "out")])
    assert replay_trace.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("bad.json: ") and told in lines[0] and "No such file" in lines[1]
    assert not (tmp_path / "out").exists()


def test_the_recording_is_not_replaced(tmp_path):
    recording = tmp_path / "a.json"
    recording.write_text("{}")
    with pytest.raises(UserError, match="give another folder as --out"):
        oracle.write_beside(recording, tmp_path / "." / "", {})
    with pytest.raises(UserError, match="cannot be written"):
        oracle.write_beside(recording, recording / "out", {})
    assert recording.read_text() == "{}"


def test_a_difference_is_told_and_fails(tmp_path, monkeypatch, capsys):
    trace = oracle.read_json(oracle.DATA / "streaming" / "equal_windows.json.gz")
    rounds = trace["rounds"][:2]
    for change in ({"generated": [1]}, {"kv_len_out": 0}, {"position_ids": [[0.0]] * 3}, {"logits_cand": [[float("nan")] * 24] * 12}):
        with pytest.raises(AssertionError, match="round 1: "):
            replay_trace.compare(rounds, [rounds[0], rounds[1] | change])
    monkeypatch.setattr(replay_trace, "produce", lambda _: rounds)
    for recorded, code, told in ((rounds, 0, "2 rounds exact"), (rounds[:1], 1, "2 rounds, not 1"), ([], 0, "2 rounds produced, none recorded")):
        oracle.write_json(tmp_path / "a.json", trace | {"rounds": recorded})
        monkeypatch.setattr("sys.argv", ["replay_trace.py", str(tmp_path / "a.json")])
        assert replay_trace.main() == code
        assert told in capsys.readouterr().out


def test_replay_needs_no_answers(tmp_path, monkeypatch, capsys):
    """The same file is written whether or not the trace holds its rounds."""
    trace = oracle.read_json(oracle.DATA / "streaming" / "long_initial_text.json.gz")
    trace["case"]["duration"] = 3
    whole, bare = tmp_path / "whole.json", tmp_path / "bare.json"
    oracle.write_json(whole, trace | {"rounds": trace["rounds"][:3]})
    oracle.write_json(bare, {key: trace[key] for key in ("family", "case", "config", "candidate_token_ids")})
    written = []
    for path in (whole, bare):
        monkeypatch.setattr("sys.argv", ["replay_trace.py", str(path), "--out", str(tmp_path / "out")])
        assert replay_trace.main() == 0
        written.append(oracle.read_json(tmp_path / "out" / path.name)["rounds"])
    assert written[0] == written[1]
    assert "3 rounds exact" in capsys.readouterr().out
