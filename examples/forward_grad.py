"""Gradients through the plain forward: one step of gradient descent makes a text likelier. A few seconds on a CPU.

    python examples/forward_grad.py
"""

import jax
import jax.numpy as jnp
import numpy as np

import svlm_jax
from svlm_jax.model.qwen_vl import forward

model = svlm_jax.load()
tokens = np.asarray(model.tokenizer.encode("The goalkeeper throws the ball to the left."), np.int32)[None]
positions = np.repeat(np.arange(tokens.shape[1], dtype=np.int32)[None, :, None], 3, axis=2)


def loss(params):
    """Mean cross-entropy of every token, from those before it."""
    logits = forward(params, model.config, tokens, positions, remat=True)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -chosen.mean()


params = jax.tree.map(lambda a: a.astype(jnp.float32), model.params)
before, gradients = jax.jit(jax.value_and_grad(loss))(params)
after = jax.jit(loss)(jax.tree.map(lambda a, g: a - 0.1 * g, params, gradients))
print(f"cross-entropy {before:.3f} before the step, {after:.3f} after it")
