"""Ten seconds of two streams in one program, as they are in the bundled match: a lax.scan over the streaming step. Half a minute on a CPU.

    python examples/stream_scan.py
"""

import jax
import numpy as np

import svlm_jax
from svlm_jax.checkpoints.stream_settings import read_stream_settings
from svlm_jax.config import StreamConfig
from svlm_jax.data.video import read_rounds
from svlm_jax.demo.bundle import clip_path
from svlm_jax.streaming.engine import Engine, make_spec
from svlm_jax.streaming.step import decode, ingest

model, rounds, height, width = svlm_jax.load(), 10, 224, 336
config = StreamConfig(**{**read_stream_settings(model.path), "query": ""})
spec = make_spec(model.config, config, model.tokenizer, height=height, width=width)
engine = Engine(model.params, spec, model.tokenizer, streams=2)  # lays out prompts, opens streams
for row in range(2):
    engine.open(row)
parts = [read_rounds(clip_path(), fps=2, chunk_seconds=1, start=start, duration=rounds, size=(height, width)) for start in (10, 60)]
frames = np.stack([[r.frames.transpose(0, 3, 1, 2) for r in part] for part in parts], axis=1)  # [round, stream, frame, colour, y, x]
prompts = [engine.prompt({0: (t, t + 1), 1: (t + 50, t + 51)}) for t in range(10, 10 + rounds)]
keys = jax.random.split(jax.random.key(0), 2)


def one_round(state, inputs):
    frames, prompt = inputs
    state, _ = ingest(model.params, state, frames, prompt, keys)
    return decode(model.params, state, keys)


prompts = jax.tree.map(lambda *a: np.stack(a), *prompts)
state, turns = jax.jit(jax.lax.scan, static_argnums=0)(one_round, engine.state, (frames, prompts))
for t in range(rounds):
    said = [engine.spoken(np.asarray(turns.tokens)[t, row, : turns.length[t, row]].tolist()) for row in range(2)]
    print(f"{t:2} s, {int(turns.cached[t, 0])} tokens cached:", " | ".join(map(repr, said)))
