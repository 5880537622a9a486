"""The model of the simulated match: matches in chunks of 24 and of 144 s that share half, with previous text, silence and questions.

In a stream, words that left the window keep the keys and values that they had among pictures, and these pictures are gone: neither chunks
that see all that is before, nor their previous text, which is read without any, have such words. So what leaves a stream's cache
leaves these rows as well (`window`), and long chunks have words that are older than it by far.

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
SAMPLE = SampleConfig("streaming", fps=2, text_sink=64, text_sliding=448, window=16)
SHARES = {"placed": 0.26, "asked": 0.14, "long": 0.18, "goals": 0.18, "chunks": 0.12, "openings": 0.12}  # of samples; long ones are 5 times as long


def config() -> RunConfig:
    return RunConfig(
        out="run",
        data=DataConfig(
            {name: DatasetConfig(f"{FOLDER}/{name}.jsonl", FOLDER, weight=share) for name, share in SHARES.items()},
            LoaderConfig(SAMPLE, max_pixels=HEIGHT * WIDTH, max_seconds=144.0, cache_bytes=0),
            RowShape(tokens=24_576, bins=168, windows=6, samples=6, memory=640, reach=2816),  # 144 s and 24 s, a bin a second; or six times 24 s
            rows=8,
            lanes=8,
            open_rows=3,
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
