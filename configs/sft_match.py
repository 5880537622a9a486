"""The model of the simulated match: matches in chunks of 24 s that share 12 s, with previous text, silence and questions.

Previous text stands before all pictures here, so a stream reads its own anew now and then (`text_refresh` in the model's streaming.json).

    python -m svlm_jax.demo.training_data data --matches 32 --minutes 120 --openings 640 --drills 64 --processes 16
    python -m svlm_jax.demo.make_match_model start
    python train.py sft_match_sight out=run0 weights=start
    python train.py sft_match out=run weights=run0

All of the model is trained, the vision tower as well. docs/match.md has what it takes and what comes out.
"""

from svlm_jax.data.loader import LoaderConfig
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import DataConfig, DatasetConfig, Workers
from svlm_jax.data.samples import SampleConfig
from svlm_jax.demo.picture import HEIGHT, WIDTH
from svlm_jax.training.config import CheckpointConfig, RunConfig
from svlm_jax.training.optimizer import OptimizerConfig
from svlm_jax.training.step import StepConfig

FOLDER = "data"
SAMPLE = SampleConfig("streaming", fps=2, text_sink=64, text_sliding=448)
SHARES = {"placed": 0.30, "asked": 0.20, "goals": 0.10, "chunks": 0.30, "openings": 0.10}  # of samples


def config() -> RunConfig:
    return RunConfig(
        out="run",
        data=DataConfig(
            {name: DatasetConfig(f"{FOLDER}/{name}.jsonl", FOLDER, weight=share) for name, share in SHARES.items()},
            LoaderConfig(SAMPLE, max_pixels=HEIGHT * WIDTH, cache_bytes=0),
            RowShape(tokens=4096, bins=24, windows=6, samples=8),  # a chunk of 24 s, a bin a second; of 4 s: six
            rows=48,
            lanes=16,
            open_rows=1,
        ),
        steps=3_000,
        model="match",
        workers=Workers(processes=1, threads=1, ahead=4, batches_ahead=4),
        step=StepConfig(
            frozen=(),
            loss_chunk=4096,
            spike_deviations=0.0,
            optimizer=OptimizerConfig(kind="muon", learning_rate=4e-3, warmup=0.05, final=0.1, b2=0.98, weight_decay=0.05),
        ),
        remat="nothing",
        vision_remat="nothing",
        checkpoint=CheckpointConfig(every=400, keep=3),
    )
