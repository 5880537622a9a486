"""Packed rows give what their chunks give alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import packed

from svlm_jax.configs.models import tiny
from svlm_jax.model.qwen_vl import forward, init_params
from svlm_jax.sharding import make_mesh
from svlm_jax.training.attention import Job, choose
from svlm_jax.training.forward import Recipe, hidden_states
from svlm_jax.training.placement import Placement

CONFIG = tiny(256)
UNIT = 2
A = packed.chunk(5, (4, 56, 84), 9, seed=0, unit=UNIT)  # two grids of one window, partial
B = packed.chunk(3, (2, 140, 168), 6, (1, 28, 28), 4, seed=1, unit=UNIT)  # four windows of other sizes; an image of one token
C = packed.chunk(11, seed=2, unit=UNIT)
ROWS = [[A, B], [C, A, C]]


def recipe(**changes) -> Recipe:
    mesh = make_mesh()
    attention = choose("xla", Job(CONFIG, mesh, "cpu", 96, 4, jnp.float32))
    return dataclasses.replace(Recipe(attention, Placement(mesh), UNIT, "full", "nothing"), **changes)


def test_packed_equals_alone():
    params = init_params(CONFIG, jax.random.key(0), stacked=True)
    batch = packed.pack(CONFIG, ROWS, tokens=96, bins=2, windows=6)
    assert (batch.grids[0].max(-1) >= 2).any()  # several grids share a bin

    @jax.jit
    def logits(params, batch):
        model, x = hidden_states(params, CONFIG, batch, recipe())
        return model.text.logits(x)

    found = np.asarray(logits(params, batch))
    for row, chunks in zip(found, ROWS, strict=True):
        start = 0
        for chunk in chunks:
            clips = [clip[None] for clip in chunk.clips]
            places = chunk.places[None] if clips else None
            alone = forward(
                params, CONFIG, chunk.tokens[None], chunk.positions[None], visuals=clips, places=places, denominator=UNIT
            )
            np.testing.assert_allclose(row[start : start + len(chunk.tokens)], np.asarray(alone)[0], atol=2e-5, rtol=0)
            start += len(chunk.tokens)
    assert np.isfinite(found).all()  # of padding too
