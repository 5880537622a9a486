"""Produces streaming traces from their settings alone, through the product's own engine, and then compares them.

    python tests/replay_trace.py TRACE... [--out DIR]

Only `family`, `case`, `config` and `candidate_token_ids` are read before the trace has been written to DIR (under the same
name, in the same format): prompts come from text by the product's prompt code with the real vocabulary, weights and frames
from the recipe, tokens from greedy decoding, and sequences, sizes and positions from the engine's state. If the file holds
`rounds`, they are compared then: tokens, surviving tokens, sizes and positions exactly, logits within 1e-3.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import recipe

from svlm_jax.config import StreamConfig
from svlm_jax.streaming.engine import Engine, make_spec
from svlm_jax.streaming.visible import visible

LOGIT_TOLERANCE = 1e-3  # the recordings themselves lie up to 4e-4 from a float64 run


def stream_config(case: dict[str, Any]) -> StreamConfig:
    """A trace's settings in our names."""
    rounds = round(case["duration"] / case["chunk_duration"])
    return StreamConfig(
        vision_window=case["window_size"],
        text_window=case["text_round"],
        text_sink=case["text_sink"],
        text_sliding=case["text_sliding_window"],
        max_new_tokens=case["max_new_tokens"],
        chunk_seconds=case["chunk_duration"],
        fps=case["fps"],
        mode="recompute" if case["recompute"] else "streaming",
        positions="append" if case["pos_mode"] == "append" else "contiguous",
        query=case["query"],
        previous_text=case["previous_text"],
        temperature=0,
        repetition_penalty=case["repetition_penalty"],
        text_capacity=max(1, rounds * case["max_new_tokens"]),
    )


def make_engine(trace: dict[str, Any], *, streams: int = 1) -> Engine:
    """An engine over the traced model, with no stream open."""
    config, params = oracle.make_model(trace)
    case, tokenizer = trace["case"], oracle.tokenizer()
    size = {"height": case["height"], "width": case["width"]}
    spec = make_spec(config, stream_config(case), tokenizer, **size, watch=trace["candidate_token_ids"])
    return Engine(params, spec, tokenizer, streams=streams)


def frames(case: dict[str, Any], index: int) -> np.ndarray:
    """The frames of round `index` of a trace, uint8 [F, 3, height, width]."""
    count = int(case["fps"] * case["chunk_duration"])
    return recipe.frames(case["seed"], case.get("skip_first_chunk", 0) + index, count, case["height"], case["width"])


def times(case: dict[str, Any], index: int) -> tuple[float, float]:
    chunk = case.get("skip_first_chunk", 0) + index
    return chunk * case["chunk_duration"], (chunk + 1) * case["chunk_duration"]


def read_sequence(engine: Engine, row: int) -> dict[str, Any]:
    """What the state says between `ingest` and `decode`: the sequence, its positions, and how much of it was cached before."""
    seen, spec = visible(engine.state, row), engine.spec
    rounds, new = spec.cache.rounds, seen.slots
    room = rounds.room(int(engine.state.round))
    fresh = (spec.cache.region_of[new] == rounds.region) & (spec.cache.room_of[new] == room)
    if engine.state.age[row] == 0:
        fresh[:] = True  # the first prompt holds system prompt, previous text and query too
    cached = 0 if spec.stream.mode == "recompute" else int(np.sum(~fresh))
    positions = seen.positions[:, cached:] if spec.stream.positions == "append" else seen.positions
    return {"sequence_in": seen.tokens.tolist(), "kv_len_in": cached, "position_ids": positions.tolist()}


def produce(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """`rounds` of a trace, from the settings in its other keys."""
    case, engine = trace["case"], make_engine(trace)
    engine.open(0)
    rounds = []
    for index in range(round(case["duration"] / case["chunk_duration"])):
        engine.ingest(frames(case, index)[None], engine.prompt({0: times(case, index)}))
        record = read_sequence(engine, 0)
        turn = engine.decode()
        length = int(turn.length[0])
        record["generated"] = np.asarray(turn.tokens)[0, :length].tolist()
        record["logits_cand"] = np.asarray(turn.watched)[0, :length].tolist()
        record["kv_len_out"] = int(turn.cached[0])
        engine.note({0: record["generated"]})
        rounds.append(record)
    return rounds


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """The largest difference of a logit. AssertionError names the first round and key that differ."""
    assert len(ours) == len(theirs), f"{len(ours)} rounds, not {len(theirs)}"
    worst = 0.0
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for key in ("kv_len_in", "sequence_in", "generated", "kv_len_out"):
            assert our[key] == their[key], f"round {index}: {key} differs:\n  {our[key]}\n  {their[key]}"
        ours_at, theirs_at = np.array(our["position_ids"]), np.array(their["position_ids"])
        assert ours_at.shape == theirs_at.shape and np.abs(ours_at - theirs_at).max() < 1e-6, f"round {index}: positions differ"
        difference = np.abs(np.array(our["logits_cand"]) - np.array(their["logits_cand"])).max()
        worst = max(worst, float(difference))
        assert difference <= LOGIT_TOLERANCE, f"round {index}: a logit differs by {difference:.1e}"
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder that the produced traces are written to")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.traces:
        trace = oracle.read_json(path)
        recorded = trace.pop("rounds", None)
        produced = {**trace, "rounds": produce(trace)}
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            oracle.write_json(arguments.out / path.name, produced)
        if recorded is None:
            print(f"{path.name}: {len(produced['rounds'])} rounds produced, none recorded to compare with", flush=True)
            continue
        try:
            worst = compare(produced["rounds"], recorded)
            print(f"{path.name}: {len(recorded)} rounds exact, largest difference of a logit {worst:.1e}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{path.name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
