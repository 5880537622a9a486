"""How often a model in eight bits takes the word that the recorded one took, every word before it being the recorded one.

    python tests/quantized_traces.py TRACE... [--kind int8 fp8 kv]

The recorded models are tiny and have random weights, whose likeliest words lie close together: a learnt model agrees more often.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from replay_trace import count_rounds, frames, make_engine, times

from svlm_jax.config import KeysValues
from svlm_jax.model.quantized import Quantization, quantize
from svlm_jax.model.qwen_vl import bind
from svlm_jax.streaming.sampling import visible_tokens
from svlm_jax.streaming.step import _decode_step


@functools.partial(jax.jit, donate_argnames="state")
def _step(params, state, key, step):
    return _decode_step(bind(state.spec.model, params), state, key, step, state.spec.cache.rounds.room(state.round))


def agreement(
    trace: dict[str, Any], quantization: Quantization | None, *, kv: KeysValues | None = None, rounds: int | None = None
) -> tuple[int, int]:
    """(words that agree, words) over all rounds of a trace, or the first ones; None: weights, or keys and values, as they are."""
    engine, agree, count = make_engine(trace, kv=kv), 0, 0
    if quantization is not None:
        engine.params = quantize(engine.params, quantization)
    engine.open(0)
    for index in range(count_rounds(trace["case"]) if rounds is None else rounds):
        recorded = trace["rounds"][index]["generated"]
        engine.ingest(frames(trace["case"], index)[None], engine.prompt({0: times(trace["case"], index)}))
        state = engine.state
        seen = visible_tokens(state.tokens, state.valid, state.seen.shape[1])  # without the first word, which may be another one
        for step, word in enumerate(recorded):
            if step:
                engine.state = _step(engine.params, engine.state, engine._key, jnp.int32(step))
            said = int(engine.state.turn[0, step])
            agree, count = agree + (said == word), count + 1
            seen = seen.at[0, word].set(True)
            turn = engine.state.turn.at[0, step].set(word)
            engine.state = engine.state.replace(turn=turn, seen=jnp.copy(seen), done=jnp.zeros_like(engine.state.done))
        engine.state = engine.state.replace(done=jnp.ones_like(engine.state.done))
        engine.decode()
        engine.note({0: recorded})
    return agree, count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument(
        "--kind", nargs="+", default=["none", "int8", "fp8", "kv"], help="weights in int8 or fp8; kv: keys and values in int8"
    )
    arguments = parser.parse_args()
    for kind in arguments.kind:
        quantization = None if kind in ("none", "kv") else Quantization(kind)
        kv: KeysValues | None = "int8" if kind == "kv" else None
        found = np.array([agreement(oracle.read_json(path), quantization, kv=kv) for path in arguments.traces])
        for path, (agree, count) in zip(arguments.traces, found, strict=True):
            print(f"{kind} {path.name}: {agree} of {count} words", flush=True)
        agree, count = found.sum(0)
        print(f"{kind}: {agree} of {count} words, {100 * agree / count:.1f}%", flush=True)


if __name__ == "__main__":
    main()
