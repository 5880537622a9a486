"""Attention of the vision tower as it is handed to cuDNN, which takes fewer shapes than plain products do."""

import jax
import jax.numpy as jnp
import numpy as np

from svlm_jax.model import vision


def test_masks_for_cudnn_have_all_rows(monkeypatch):
    """Grids whose windows are not all full have a mask; cuDNN wants it for each pair of patches."""
    asked, plain = [], jax.nn.dot_product_attention

    def library(q, k, v, *, mask, implementation):
        assert implementation == "cudnn"
        assert mask.shape[-2:] == (q.shape[1], k.shape[1])  # else cuDNN refuses
        asked.append(mask.shape)
        return plain(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, 64, 2, 16)), jnp.bfloat16) for _ in range(3))
    valid = jnp.asarray(rng.random((9, 64)) < 0.8)
    found = vision._attend(q, k, v, valid, full=True)
    fq, fk, fv = (a.reshape(1, 1, 576, 2, 16) for a in (q, k, v))
    expected = vision.masked_attention(fq, fk, fv, valid.reshape(1, -1)[:, None, None, :]).reshape(found.shape)
    assert len(asked) == 1
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=0.02)
