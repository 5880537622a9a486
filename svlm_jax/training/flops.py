"""Operations that one batch must take, by part: what model FLOPs utilisation is measured by.

A multiply-add counts as two. Only tokens and patches that are there count, attention causally within segments, the head for labelled
tokens alone; nothing is counted twice for being recomputed. Backward: the same again for inputs, and once more for weights that are trained.
"""

import dataclasses
from typing import Any

import numpy as np

from svlm_jax.config import ModelConfig, VisionConfig
from svlm_jax.data.batch import IGNORED, PADDING, Batch
from svlm_jax.data.eviction import Eviction
from svlm_jax.types import Bool, Float, Int

PEAKS = {  # dense bfloat16 operations a second of one device, from its maker's data sheet
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Operations:
    """Of one batch."""

    decoder: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0

    @property
    def total(self) -> float:
        return self.decoder + self.attention + self.head + self.vision

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def operations(model: ModelConfig, batch: Batch, trained: set[str]) -> Operations:
    """Of a batch on the host. `trained` are the paths of trained parameters; those of adapters leave the weights as they are."""
    t, v = model.text, model.vision
    seen = any(path.startswith("vision.") for path in trained)
    weights = any(path.startswith("text.layers.") and ".lora_" not in path for path in trained)
    head_weights = any(path in ("text.head", "text.embedding") for path in trained)
    segments, tokens = np.asarray(batch.segments), int((np.asarray(batch.segments) != PADDING).sum())
    lengths = _sizes(segments)
    pairs = float((lengths * (lengths + 1) / 2).sum()) if batch.eviction is None else _seen(batch.eviction, segments != PADDING)
    width, heads = t.hidden_size, t.num_attention_heads * (t.head_dim or 0)
    layer = width * (2 * heads + 2 * t.num_key_value_heads * (t.head_dim or 0) + 3 * t.intermediate_size)
    labels = int((np.asarray(batch.labels) != IGNORED).sum())
    return Operations(
        decoder=2.0 * tokens * layer * t.num_hidden_layers * (3 if weights else 2),
        attention=4.0 * heads * pairs * t.num_hidden_layers * 3,
        head=2.0 * labels * width * t.vocab_size * (3 if head_weights else 2),
        vision=_vision(v, batch) * (3 if seen else 1),
    )


def _vision(c: VisionConfig, batch: Batch) -> float:
    valid, grids = np.asarray(batch.patch_valid), np.asarray(batch.grids)
    in_window = valid.sum(-1).astype(np.float64)  # [B, G, W]
    patches = in_window.sum()
    full = float((_sizes(grids.reshape(-1, grids.shape[-1]), in_window.reshape(-1, grids.shape[-1])) ** 2).sum())
    products = c.hidden_size * (4 * c.hidden_size + (c.mlp_inputs + 1) * c.intermediate_size)
    merged = c.hidden_size * c.spatial_merge_size**2
    mergers = (merged * merged + merged * c.out_hidden_size) / c.spatial_merge_size**2 * (1 + len(c.deepstack_blocks))
    wide = sum(map(c.sees_all, range(c.depth)))
    attention = 4 * c.hidden_size * (wide * full + (c.depth - wide) * float((in_window**2).sum()))
    return 2 * patches * (c.depth * products + c.patch_features * c.hidden_size + mergers) + attention


def _seen(facts: Eviction, there: Bool[np.ndarray, "B T"]) -> float:
    """Pairs of a token and one that it sees, in its window or as previous text."""
    place = np.arange(there.shape[1])
    window = ((place - np.asarray(facts.start) + 1) * there).sum()
    words = 0
    for real, round, *places in zip(there, *map(np.asarray, (facts.round, facts.source, facts.first, facts.stop)), strict=True):
        tokens = np.flatnonzero(real)  # their rounds are in order
        behind, from_, to = (np.searchsorted(*pair) for pair in zip((tokens, round[tokens], round[tokens]), places, strict=True))
        words += np.maximum(to - np.maximum(from_, behind), 0).sum()
    return float(window + words)


def _sizes(groups: Int[np.ndarray, "n m"], weights: Float[np.ndarray, "n m"] | None = None) -> Float[np.ndarray, "n groups"]:
    """How many of a row's elements, or how much weight, each group but PADDING has. At once: a loop over rows takes longer than a GPU's step."""
    most = int(groups.max()) + 1
    keys = groups + most * np.arange(len(groups))[:, None]
    found = np.bincount(keys.ravel(), None if weights is None else weights.ravel(), most * len(groups))
    return found.reshape(len(groups), most)[:, 1:].astype(np.float64)


def peak(device: Any) -> float | None:
    """Operations a second of this device at best; None where it is not in the table."""
    kinds = sorted((kind for kind in PEAKS if kind in device.device_kind), key=len)
    return PEAKS[kinds[-1]] if kinds else None
