"""Engines that say what a row says, whatever their logits are."""

import jax
import jax.numpy as jnp
import numpy as np
import small

from svlm_jax.config import StreamConfig
from svlm_jax.data.batch import IGNORED
from svlm_jax.streaming import engine as engine_module
from svlm_jax.streaming import step
from svlm_jax.streaming.prompt import PromptLayout


def forced_engine(monkeypatch, config: StreamConfig, turns: list[list[int]], **how):
    """An engine that says `turns`, one a round."""
    script = np.zeros((len(turns), config.max_new_tokens), np.int32)
    for index, ids in enumerate(turns):
        script[index, : len(ids)] = ids
    table = jnp.asarray(script.reshape(-1))
    monkeypatch.setattr(step, "sample", lambda logits, seen, keys, count, config: table[count])
    fresh = {name: jax.jit(lambda *args, run=run: run(*args)) for name, run in (("ingest", step.ingest), ("decode", step.decode))}
    monkeypatch.setattr(engine_module, "compiled", {**engine_module.compiled, **fresh})
    return small.engine(config, **{"layers": 0, **how})


def turns_of(row, p: PromptLayout) -> list[list[int]]:
    """The labels of a row, turn by turn."""
    turns, now = [], []
    for token in row.labels[row.labels != IGNORED].tolist():
        now.append(token)
        if token == p.im_end:
            turns.append(now)
            now = []
    return turns
