"""The stage before configs/sft_match.py: the model learns to see. Drills in chunks of 4 s, and every second the question who is where.

    python train.py sft_match_sight out=run0 weights=start

Every second shows another moment, other kits and numbers: what is asked can only be read off the picture, and off one of four instead of
24, as what a short chunk shows is found sooner.
"""

import dataclasses

from svlm_jax.configs import sft_match
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import DatasetConfig
from svlm_jax.training.config import RunConfig


def config() -> RunConfig:
    first = sft_match.config()
    glances = DatasetConfig(f"{sft_match.FOLDER}/glances.jsonl", sft_match.FOLDER)
    shape = RowShape(tokens=4096, bins=24, windows=6, samples=8)  # six chunks
    loader = dataclasses.replace(first.data.loader, sample=dataclasses.replace(first.data.loader.sample, window=None))  # nothing is so old
    data = dataclasses.replace(first.data, loader=loader, datasets={"glances": glances}, shape=shape, rows=48, lanes=16, open_rows=1, seed=2)
    return dataclasses.replace(first, out="run0", data=data)
