"""Text-only Qwen2 and Qwen2.5 weights (Qwen2ForCausalLM) as the decoder of a Qwen-VL model, whose vision tower another checkpoint gives."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from svlm_jax.checkpoints.hub_config import read_decoder
from svlm_jax.checkpoints.plan import Path_
from svlm_jax.checkpoints.source import HubSource, Source
from svlm_jax.config import ModelConfig
from svlm_jax.errors import UserError
from svlm_jax.storage import Place


class TextWithTower:
    """A whole model: the decoder of one directory, the vision tower of another. Nothing is made up: each must hold its part in full."""

    quantization = None

    def __init__(self, folder: Place, tower: Source, config: ModelConfig, *, dtype: Any = None):
        """Raises UserError where the decoder is not of the size that `config` (the tower's) calls for.

        Args:
          folder: of the text-only weights.
          tower: the checkpoint that gives the vision tower; its decoder is not read.
          dtype: of all parameters; None: as the text-only weights are.
        """
        decoder = read_decoder(folder, config.text)
        odd = [field.name for field in dataclasses.fields(decoder) if getattr(decoder, field.name) != getattr(config.text, field.name)]
        if odd:
            told = ", ".join(f"{name} {getattr(decoder, name)} where the other has {getattr(config.text, name)}" for name in odd)
            raise UserError(f"{folder} has another decoder than the checkpoint that is to give the vision tower: {told}; take one of its own size")
        self._text = HubSource(folder, config, dtype=dtype, tower=False)
        self._tower, self.dtype = tower, self._text.dtype
        self.shapes = {path: shape for path, shape in tower.shapes.items() if path[0] == "vision"} | self._text.shapes

    def expect(self, paths: Sequence[Path_]) -> None:
        """Says that these are going to be read."""
        self._tower.expect([path for path in paths if path[0] == "vision"])
        self._text.expect([path for path in paths if path[0] != "vision"])

    def read(self, paths: Sequence[Path_]) -> dict[Path_, np.ndarray]:
        """These parameters, whole, as `dtype`."""
        of_tower = [path for path in paths if path[0] == "vision"]
        with np.errstate(all="ignore"):  # what no longer fits into a narrower dtype is found afterwards
            found = {path: array.astype(self.dtype, copy=False) for path, array in self._tower.read(of_tower).items()} if of_tower else {}
        return found | self._text.read([path for path in paths if path[0] != "vision"])
