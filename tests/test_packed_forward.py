"""Packed rows give what their chunks give alone."""

import jax
import jax.numpy as jnp
import numpy as np
import packed
import pytest
import small

from svlm_jax.model.qwen_vl import forward, init_params
from svlm_jax.sharding import make_mesh
from svlm_jax.training.attention import Job, choose
from svlm_jax.training.forward import Recipe, hidden_states
from svlm_jax.training.placement import Placement

UNIT = 2


def rows(side: int) -> list[list[packed.Chunk]]:
    """Chunks of clips whose tokens cover side x side pixels."""
    how = {"unit": UNIT, "side": side}
    a = packed.chunk(5, (4, 2 * side, 3 * side), 9, seed=0, **how)  # two grids of one window, partial
    b = packed.chunk(3, (2, 5 * side, 6 * side), 6, (1, side, side), 4, seed=1, **how)  # several windows, of other sizes; an image of one token
    c = packed.chunk(11, seed=2, **how)
    return [[a, b], [c, a, c]]


@pytest.mark.parametrize("family", small.FAMILIES)
def test_packed_equals_alone(family):
    config, mesh = small.FAMILIES[family](256), make_mesh()
    chunks_of = rows(config.vision.merged_patch_size)
    params = init_params(config, jax.random.key(0), stacked=True)
    batch = packed.pack(config, chunks_of, tokens=96, bins=2, windows=6)
    recipe = Recipe(choose("xla", Job(config, mesh, "cpu", 96, 4, jnp.float32)), Placement(mesh), UNIT, "full", "nothing")
    assert (batch.grids[0].max(-1) >= 2).any()  # several grids share a bin

    @jax.jit
    def logits(params, batch):
        model, x = hidden_states(params, config, batch, recipe)
        return model.text.logits(x)

    found = np.asarray(logits(params, batch))
    for row, chunks in zip(found, chunks_of, strict=True):
        start = 0
        for chunk in chunks:
            clips = [clip[None] for clip in chunk.clips]
            places = chunk.places[None] if clips else None
            alone = forward(
                params, config, chunk.tokens[None], chunk.positions[None], visuals=clips, places=places, denominator=UNIT
            )
            np.testing.assert_allclose(row[start : start + len(chunk.tokens)], np.asarray(alone)[0], atol=2e-5, rtol=0)
            start += len(chunk.tokens)
    assert np.isfinite(found).all()  # of padding too
