"""The stage before configs/sft_match.py: the model learns to see. Drills in chunks of 4 s, and every second the question who is where.

    python train.py sft_match_sight out=run0 weights=start

Every second shows another moment, other kits and numbers: what is asked can only be read off the picture, and off one of four instead of
24, as what a short chunk shows is found sooner.
"""

import dataclasses

from svlm_jax.configs import sft_match
from svlm_jax.data.pipeline import DatasetConfig
from svlm_jax.training.config import RunConfig


def config() -> RunConfig:
    first = sft_match.config()
    glances = DatasetConfig(f"{sft_match.FOLDER}/glances.jsonl", sft_match.FOLDER)
    return dataclasses.replace(first, out="run0", data=dataclasses.replace(first.data, datasets={"glances": glances}, seed=2))
