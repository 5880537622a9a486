"""The recorded behaviour of the original system, reproduced: see `replay_trace` and `replay_forward`."""

import oracle
import pytest
import replay_forward
import replay_trace
from contract import replay

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
