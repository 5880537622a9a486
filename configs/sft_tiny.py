"""A tiny model on a bundled clip of twelve seconds, with a commentary of made-up words: shows that everything works.

    python train.py sft_tiny out=run

Its 20 steps take about 15 seconds of a CPU core, most of them compiling; the loss falls from 6.7 to below 0.5, as the clip is all there is to learn.
"""

import json
import tempfile
from pathlib import Path

from svlm_jax.data.loader import LoaderConfig
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import DataConfig, DatasetConfig, Workers
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.training.config import CheckpointConfig, RunConfig
from svlm_jax.training.optimizer import OptimizerConfig
from svlm_jax.training.step import StepConfig

WORDS = ["the", "red", "team", "shoots", "and", "the", "goalkeeper", "saves", "it"]


def annotations(folder: Path) -> Path:
    """Overlapping chunks of the clip, four seconds each, in the published format."""
    rows = []
    for start in range(0, 8, 2):
        said = [[start + i / 2, start + i / 2 + 0.4, WORDS[(start + i) % len(WORDS)]] for i in range(8)]
        clip = {"type": "video", "video": str(sample_path()), "video_start": float(start), "video_end": start + 4.0}
        user = {"role": "user", "content": [clip, {"type": "text", "text": "", "previous": " ".join(WORDS[:start])}]}
        rows.append([user, {"role": "assistant", "content": [{"type": "text_stream", "text_stream": said}]}])
    file = folder / "sample_annotations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config() -> RunConfig:
    folder = Path(tempfile.gettempdir()) / "svlm-jax-sft-tiny"
    folder.mkdir(exist_ok=True)
    return RunConfig(
        out=str(folder / "run"),
        data=DataConfig(
            {"sample": DatasetConfig(str(annotations(folder)))},
            LoaderConfig(max_pixels=28 * 28 * 12),
            RowShape(tokens=256, bins=4, windows=2),
            rows=4,
            lanes=4,
        ),
        steps=20,
        weights=str(tiny_path()),
        workers=Workers(threads=1),
        step=StepConfig(dtype="float32", loss_chunk=64, optimizer=OptimizerConfig(learning_rate=3e-3, b2=0.99)),
        remat="nothing",
        checkpoint=CheckpointConfig(every=10),
    )
