"""The assistant's turns in packed rows, by their labels: where each begins, and whether it is silent."""

import dataclasses
from typing import Any

import numpy as np

from svlm_jax.data.batch import IGNORED, Batch
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Bool, Int


@dataclasses.dataclass(frozen=True)
class Turns:
    """Of some rows, one after the other."""

    rows: Int[np.ndarray, "n"]
    firsts: Int[np.ndarray, "n"]  # where in its row a turn's first label stands
    lengths: Int[np.ndarray, "n"]  # labels
    silent: Bool[np.ndarray, "n"]  # nothing but the pause and the end of the turn

    @property
    def silent_labels(self) -> int:
        return int(self.lengths[self.silent].sum())


def silence(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The labels of a silent turn."""
    return (*tokenizer.encode_plain(" ..."), PromptLayout.from_tokenizer(tokenizer).im_end)


def turns_of(batch: Batch, silence: tuple[int, ...]) -> Turns:
    """The turns of a batch on the host: runs of labels, as no two turns follow without a token between them that has none."""
    labels: Any = np.asarray(batch.labels)
    asked = labels != IGNORED
    edges = np.diff(np.pad(asked, [(0, 0), (1, 1)]).astype(np.int8), axis=1)
    (rows, firsts), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    lengths = ends - firsts
    silent = lengths == len(silence)
    for offset, token in enumerate(silence):
        silent &= labels[rows, np.minimum(firsts + offset, labels.shape[1] - 1)] == token
    return Turns(rows, firsts, lengths, silent)
