"""Ten seconds of two streams in one program: a lax.scan over the streaming step. A few seconds on a CPU.

    python examples/stream_scan.py
"""

import jax
import numpy as np

import svlm_jax
from svlm_jax.config import StreamConfig
from svlm_jax.streaming.engine import Engine, make_spec
from svlm_jax.streaming.step import decode, ingest

model = svlm_jax.load()
config = StreamConfig(vision_window=4, text_window=4, max_new_tokens=8, query="")
spec = make_spec(model.config, config, model.tokenizer, height=56, width=84)
engine = Engine(model.params, spec, model.tokenizer, streams=2)  # lays out prompts, opens streams
for row in range(2):
    engine.open(row)
rounds = 10
noise = np.random.default_rng(0).integers(0, 256, (rounds, 2, config.frames_per_round, 3, 56, 84), dtype=np.uint8)
prompts = [engine.prompt({0: (t, t + 1), 1: (t + 60, t + 61)}) for t in range(rounds)]
keys = jax.random.split(jax.random.key(0), 2)


def one_round(state, inputs):
    frames, prompt = inputs
    state, _ = ingest(model.params, state, frames, prompt, keys)
    return decode(model.params, state, keys)


@jax.jit
def watch(state, frames, prompts):
    return jax.lax.scan(one_round, state, (frames, prompts))


state, turns = watch(engine.state, noise, jax.tree.map(lambda *a: np.stack(a), *prompts))
for t in range(rounds):
    said = [engine.spoken(np.asarray(turns.tokens)[t, row, : turns.length[t, row]].tolist()) for row in range(2)]
    print(f"{t:2} s, {int(turns.cached[t, 0])} tokens cached:", " | ".join(map(repr, said)))
