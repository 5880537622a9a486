"""The last stage of the model of the simulated match: the densest chunks, questions as seldom as in use, the learning rate down to zero.

    python train.py sft_match_dense out=run2 weights=run steps=800

Before it: configs/sft_match_sight.py, configs/sft_match.py.
"""

import dataclasses

from svlm_jax.configs import sft_match
from svlm_jax.data.pipeline import DatasetConfig
from svlm_jax.training.config import RunConfig

SHARES = {"dense": 0.35, "chunks": 0.2, "asked": 0.1, "goals": 0.15, "placed": 0.1, "openings": 0.1}


def config() -> RunConfig:
    first = sft_match.config()
    sets = {name: DatasetConfig(f"{sft_match.FOLDER}/{name}.jsonl", sft_match.FOLDER, weight=share) for name, share in SHARES.items()}
    optimizer = dataclasses.replace(first.step.optimizer, warmup=0.03, final=0.0)
    return dataclasses.replace(
        first,
        out="run2",
        data=dataclasses.replace(first.data, datasets=sets, seed=1),
        steps=800,
        step=dataclasses.replace(first.step, optimizer=optimizer),
    )
