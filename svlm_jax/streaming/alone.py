"""A sequence that nothing stands before, through all layers: what opens a stream, and what is read anew within one."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from svlm_jax.kernels.ring_attention.api import ring_attention
from svlm_jax.model.layers import take_layer
from svlm_jax.model.qwen_vl import QwenVL
from svlm_jax.model.rope import Rotation, rotate
from svlm_jax.types import Array, Bool, Float


def run_alone(
    model: QwenVL,
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    turn: Rotation,
    keep: Callable[[int, Float[Array, "B T K H"], Float[Array, "B T K H"]], None],
    *,
    deep: Sequence[Float[Array, "B T D"]] = (),
) -> Float[Array, "B T D"]:
    """The last layer's output.

    Args:
      x: embeddings in the order of the sequence.
      valid: which of them count; the others are holes.
      turn: each token's rotation, [B, T, 1, H / 2].
      keep: is given each layer's number, and its keys, not rotated, and values.
      deep: added to what the first layers put out.
    """
    for index in range(model.text.config.num_hidden_layers):

        def attend(q, k, v, index=index):
            keep(index, k, v)
            self_k, self_v = jnp.swapaxes(rotate(k, turn), 1, 2), jnp.swapaxes(v, 1, 2)
            nothing, nobody = self_k[:, :, :0], valid[:, :0]
            q = rotate(q, turn)[:, None]
            return ring_attention(q, nothing, nothing, nobody, regions=((0, 0),), self_k=self_k, self_v=self_v, self_valid=valid)[0]

        x = take_layer(model.text.layers, index)(x, attend)
        x = x + deep[index] if index < len(deep) else x
    return x
