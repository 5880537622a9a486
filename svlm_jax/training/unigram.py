"""What is lost by knowing how often each token is said, and nothing else: the least that a trained model has to be better than."""

import dataclasses

import numpy as np

from svlm_jax.config import VisionConfig
from svlm_jax.data.annotations import UnusableRow
from svlm_jax.data.pipeline import DataConfig, open_source, sample_order
from svlm_jax.data.samples import lay_out
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.types import Float, Int

COUNTED = 1_000  # samples at most, the first ones in the order of training; laying one out takes milliseconds


@dataclasses.dataclass(frozen=True)
class Unigram:
    """Probabilities of tokens from counts, those never seen sharing as much as there are kinds seen (Witten and Bell 1991)."""

    losses: Float[np.ndarray, "V"]  # nats, by token

    @classmethod
    def of(cls, counts: Int[np.ndarray, "V"]) -> "Unigram":
        seen, total = int((counts > 0).sum()), int(counts.sum())
        if not total:
            return cls(np.full(len(counts), np.log(len(counts))))
        unseen = len(counts) - seen
        spread = seen if unseen else 0
        odds = np.where(counts > 0, counts, spread / max(unseen, 1)) / (total + spread)
        return cls(-np.log(odds))


def count_labels(config: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, size: int) -> Int[np.ndarray, "V"]:
    """How often each of `size` tokens is a label in the first samples of the training data. No video is opened."""
    sources = {name: open_source(dataset) for name, dataset in config.datasets.items()}
    lengths = {name: len(source.rows) for name, source in sources.items()}
    order = sample_order(config, lengths)
    mixed = any(dataset.weight is not None for dataset in config.datasets.values())  # else an epoch has every row once
    layout, side = PromptLayout.from_tokenizer(tokenizer), vision.merged_patch_size
    counts = np.zeros(size, np.int64)
    for number in range(COUNTED if mixed else min(COUNTED, sum(lengths.values()))):
        name, row = order[number]  # type: ignore[misc]
        try:
            clip = sources[name].annotation(row)
            labels = lay_out(clip, config.loader.sample, (side, side), tokenizer, layout, vision).labels  # whatever the picture's size
        except UnusableRow:
            continue
        counts += np.bincount(labels[labels >= 0], minlength=size)
    return counts
