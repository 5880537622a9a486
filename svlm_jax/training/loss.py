"""Cross-entropy of labelled tokens, in sums: micro-batches and devices add up, and dividing by the count once is exact.

The head is the widest product of the model. Only tokens with a label go through it, a chunk of each row at a time, and the chunk's
logits are computed again in the backward pass: [T, V] never exists.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from svlm_jax.config import TextConfig
from svlm_jax.data.batch import IGNORED, PADDING, Batch
from svlm_jax.model.text import Decoder, word_logits
from svlm_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Over all labelled tokens of some rows. Float32; counts are exact up to 2^24 labels."""

    loss: Float[jax.Array, ""]  # nats
    labels: Float[jax.Array, ""]
    correct: Float[jax.Array, ""]  # labels that the largest logit names
    row_loss: Float[jax.Array, "B"]  # nats by row, to name the rows that go wrong

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)


def targets_of(batch: Batch) -> tuple[Int[jax.Array, "B T"], Bool[jax.Array, "B T"]]:
    """What each token is to predict, the next one of its own segment, and whether that is asked of it."""
    following = batch.labels[:, 1:]
    asked = (following != IGNORED) & (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] != PADDING)
    end = jnp.zeros_like(batch.labels[:, :1])
    return jnp.concatenate([jnp.where(asked, following, 0), end], 1), jnp.concatenate([asked, end.astype(bool)], 1)


def _of_logits(logits: Float[Array, "B C V"], targets: Int[Array, "B C"], asked: Bool[Array, "B C"]) -> tuple[Sums, Float[Array, ""]]:
    """(sums, their loss): the latter is what is differentiated."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    row = jnp.sum(jnp.where(asked, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0), axis=-1)
    loss, right = jnp.sum(row), asked & (jnp.argmax(logits, axis=-1) == targets)
    return jax.lax.stop_gradient(Sums(loss, jnp.sum(asked, dtype=jnp.float32), jnp.sum(right, dtype=jnp.float32), row)), loss


def plain_loss(text: Decoder, x: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
    """The loss with all logits at once; for small models, and to compare with."""
    sums, loss = _of_logits(text.logits(x), *targets_of(batch))
    return loss, sums


def _pieces(batch: Batch, chunk: int) -> tuple[Int[Array, "B T"], Any]:
    """(order of a row's tokens, (order, targets, whether asked) in pieces [n, B, chunk]).

    Labelled tokens of each row come first, in order: the pieces behind the longest row's last ask for nothing. The last piece is filled up
    with T, which is no token.
    """
    targets, asked = targets_of(batch)
    order = jnp.argsort(~asked, axis=1, stable=True)
    length = order.shape[1]
    padded = jnp.pad(order, [(0, 0), (0, -length % chunk)], constant_values=length)
    asked = jnp.pad(jnp.take_along_axis(asked, order, 1), [(0, 0), (0, -length % chunk)])
    targets = jnp.take_along_axis(targets, jnp.minimum(padded, length - 1), 1)
    return order, tuple(a.reshape(a.shape[0], -1, chunk).swapaxes(0, 1) for a in (padded, targets, asked))


def _tokens_at(x: Float[Array, "B T D"], places: Int[Array, "B C"]) -> Float[Array, "B C D"]:
    """Zeros outside [0, T). That no token is taken twice is said, so that the backward pass may write where it would have to add."""
    return x.at[jnp.arange(len(x))[:, None], places].get(mode="fill", fill_value=0, unique_indices=True)


def token_losses(text: Decoder, x: Float[Array, "B T D"], batch: Batch, *, chunk: int) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """(loss of each label in nats, 0 where there is none; the token that the largest logit names), both where the label stands.

    Not for the backward pass. `x` and `chunk` are those of `chunked_loss`.
    """
    with jax.named_scope("loss"):
        order, pieces = _pieces(batch, chunk)

        def some(places: Array, targets: Array, asked: Array) -> tuple[Array, Array]:
            logits = text.logits(_tokens_at(x, places))
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            loss = jnp.where(asked, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
            return loss.astype(jnp.float32), jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def nothing(places: Array, targets: Array, asked: Array) -> tuple[Array, Array]:
            return jnp.zeros(places.shape, jnp.float32), jnp.zeros(places.shape, jnp.int32)

        def step(_: None, piece: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
            return None, jax.lax.cond(jnp.any(piece[2]), some, nothing, *piece)

        _, found = jax.lax.scan(step, None, pieces)
        back = jnp.argsort(order, axis=1)

        def placed(values: Array) -> Array:
            rows = values.swapaxes(0, 1).reshape(order.shape[0], -1)[:, : order.shape[1]]
            return jnp.roll(jnp.take_along_axis(rows, back, 1), 1, axis=1)  # a token's prediction is that of the token behind it

        return placed(found[0]), placed(found[1])


def chunked_loss(text: Decoder, x: Float[Array, "B T D"], batch: Batch, *, chunk: int) -> tuple[Float[Array, ""], Sums]:
    """The sum of the labels' losses, and all sums, of the decoder's last layer's output `x`.

    Args:
      chunk: tokens of each row that go through the head at once; their logits, [B, chunk, V] in float32, are what it costs.
    """
    with jax.named_scope("loss"):
        _, pieces = _pieces(batch, chunk)

        ends, zero = text.ends(), jnp.zeros((), jnp.float32)
        nothing = (Sums(zero, zero, zero, jnp.zeros(x.shape[0], jnp.float32)), zero)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(total: Any, piece: tuple[Array, Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, _of_piece(text.config, ends, x, piece)), None

        (sums, loss), _ = jax.lax.scan(step, nothing, pieces)
        return loss, sums


def _scored(config: TextConfig, ends: Any, x: Array, piece: tuple[Array, Array, Array]) -> tuple[Sums, Array]:
    places, targets, asked = piece
    return _of_logits(word_logits(config, ends, _tokens_at(x, places)), targets, asked)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_piece(config: TextConfig, ends: Any, x: Array, piece: tuple[Array, Array, Array]) -> tuple[Sums, Array]:
    """`_of_logits` of one piece of the rows, nothing being computed where it has no label.

    Differentiated as it is, the condition would hand its branch's intermediate results on to the backward pass: a copy of the head, and logits.
    """
    zero = jnp.zeros((), jnp.float32)
    nothing = (Sums(zero, zero, zero, jnp.zeros(x.shape[0], jnp.float32)), zero)
    return jax.lax.cond(jnp.any(piece[2]), functools.partial(_scored, config), lambda *_: nothing, ends, x, piece)


def _of_piece_back(config: TextConfig, kept: tuple[Any, Array, Any], gradients: tuple[Sums, Array]) -> tuple[Any, Array, None]:
    ends, x, piece = kept

    def some(ends: Any, x: Array) -> tuple[Any, Array]:
        return jax.vjp(lambda ends, x: _scored(config, ends, x, piece)[1], ends, x)[1](gradients[1])

    back = jax.lax.cond(jnp.any(piece[2]), some, lambda *a: jax.tree.map(jnp.zeros_like, a), ends, x)
    return *back, None


_of_piece.defvjp(lambda config, ends, x, piece: (_of_piece(config, ends, x, piece), (ends, x, piece)), _of_piece_back)
