"""Produces streaming traces from their settings alone, through the product's own engine, and then compares them.

    python tests/replay_trace.py TRACE... [--out DIR]

Only `family`, `case`, `config` and `candidate_token_ids` are read before the trace has been written to DIR (under the same
name, in the same format): prompts come from text by the product's prompt code with the real vocabulary, weights and frames
from the recipe, tokens from greedy decoding, and sequences, sizes and positions from the engine's state. If the file holds
`rounds`, they are compared then: tokens, surviving tokens, sizes and positions exactly, logits within 1e-3.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import recipe

from svlm_jax.config import KeysValues, StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.streaming.engine import Engine, make_spec
from svlm_jax.streaming.prompt import encode_words
from svlm_jax.streaming.visible import visible

LOGIT_TOLERANCE = 1e-3  # the recordings themselves lie up to 4e-4 from a float64 run
POSITION_TOLERANCE = 1e-3  # positions are whole multiples of 1/q, which a recording holds as float32: thirds at 3 frames a second
GIVEN = ("family", "case", "config", "candidate_token_ids")
NUMBERS = ("fps", "chunk_duration", "duration", "height", "width", "window_size", "text_round", "max_new_tokens", "repetition_penalty")
SETTINGS = (*NUMBERS, "seed", "text_sink", "text_sliding_window", "previous_text", "query")


def count_frames(case: dict[str, Any]) -> int:
    """Frames of a round: what a chunk has beyond a whole number is not shown."""
    return int(case["fps"] * case["chunk_duration"])


def count_rounds(case: dict[str, Any]) -> int:
    """Whole chunks of the duration (a quotient such as 0.3 / 0.1 falls just short of its whole number)."""
    return int(case["duration"] / case["chunk_duration"] + 1e-6)


def stream_config(case: dict[str, Any]) -> StreamConfig:
    """A trace's settings in our names. `text_capacity` is for all that may be said, without the initial text."""
    recompute = case.get("recompute", False)
    if not count_frames(case):
        raise UserError(f"{case['fps']} frames a second and chunks of {case['chunk_duration']} s: a round has no frame")
    return StreamConfig(
        vision_window=case["window_size"],
        text_window=case["text_round"],
        text_sink=case["text_sink"],
        text_sliding=case["text_sliding_window"],
        max_new_tokens=case["max_new_tokens"],
        chunk_seconds=count_frames(case) / case["fps"],  # `times` takes what a round says of its time from the trace
        fps=case["fps"],
        mode="recompute" if recompute else "streaming",
        positions="append" if case.get("pos_mode") == "append" and not recompute else "contiguous",
        query=case["query"] or "",
        previous_text=case["previous_text"] or "",
        temperature=0,
        repetition_penalty=case["repetition_penalty"],
        text_capacity=max(1, count_rounds(case) * case["max_new_tokens"]),
        question_capacity=0,
    )


def make_engine(trace: dict[str, Any], *, streams: int = 1, kv: KeysValues | None = None) -> Engine:
    """An engine over the traced model, with no stream open."""
    config, params = oracle.make_model(trace)
    case, tokenizer = trace["case"], oracle.tokenizer()
    size = {"height": case["height"], "width": case["width"]}
    stream = stream_config(case)
    stream = dataclasses.replace(stream, kv=kv, text_capacity=stream.text_capacity + len(encode_words(tokenizer, stream.previous_text)))
    spec = make_spec(config, stream, tokenizer, **size, watch=trace["candidate_token_ids"])
    return Engine(params, spec, tokenizer, streams=streams)


def frames(case: dict[str, Any], index: int) -> np.ndarray:
    """The frames of round `index` of a trace, uint8 [F, 3, height, width]."""
    return recipe.frames(case["seed"], (case.get("skip_first_chunk") or 0) + index, count_frames(case), case["height"], case["width"])


def times(case: dict[str, Any], index: int) -> tuple[float, float]:
    chunk = (case.get("skip_first_chunk") or 0) + index
    return chunk * case["chunk_duration"], (chunk + 1) * case["chunk_duration"]


def read_sequence(engine: Engine, row: int) -> dict[str, Any]:
    """What the state says between `ingest` and `decode`: the sequence, its positions, and how much of it was cached before."""
    seen, spec = visible(engine.state, row), engine.spec
    rounds, new = spec.cache.rounds, seen.slots
    room = rounds.room(int(engine.state.round))
    roles = spec.cache.describe()
    fresh = (roles.region[new] == rounds.region) & (roles.room[new] == room)
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
    for index in range(count_rounds(case)):
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
        assert ours_at.shape == theirs_at.shape and np.abs(ours_at - theirs_at).max() < POSITION_TOLERANCE, f"round {index}: positions differ"
        difference = np.abs(np.array(our["logits_cand"]) - np.array(their["logits_cand"])).max()
        worst = max(worst, float(difference))
        assert difference <= LOGIT_TOLERANCE, f"round {index}: a logit differs by {difference:.1e}"
    return worst


def replay(path: Path, out: Path | None) -> str:
    """Produces one trace, writes it, and says how it compares. UserError for a file that is no trace; AssertionError where they differ."""
    trace = oracle.read_json(path)
    oracle.need(trace, "the trace", *GIVEN[1:])
    oracle.need(trace["case"], "case", *SETTINGS)
    oracle.need_numbers(trace["case"], "case", *NUMBERS)
    recorded = trace.pop("rounds", None)
    produced = {**trace, "rounds": produce(trace)}
    oracle.write_beside(path, out, produced)
    if not recorded:
        return f"{len(produced['rounds'])} rounds produced, none recorded to compare with"
    worst = compare(produced["rounds"], recorded)
    return f"{len(recorded)} rounds exact, largest difference of a logit {worst:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder that the produced traces are written to")
    arguments = parser.parse_args()
    failed = 0
    for path in arguments.traces:
        try:
            print(f"{path.name}: {replay(path, arguments.out)}", flush=True)
        except (AssertionError, UserError) as error:
            failed += 1
            print(f"{path.name}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
