"""Videos of plain colours, a new one each second, that are called by their names: what is said can be known from the picture alone.

A preset for train.py as well: `python train.py tests/colours.py data.datasets.seen.path=FILE evaluation.datasets.unseen.path=FILE`.
Black is never called, so that its turns are silent.
"""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from svlm_jax.data.loader import LoaderConfig
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import DataConfig, DatasetConfig, Workers
from svlm_jax.data.samples import SampleConfig
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.training.config import CheckpointConfig, EvaluationConfig, RunConfig
from svlm_jax.training.optimizer import OptimizerConfig
from svlm_jax.training.step import StepConfig

COLOURS = {"red": (220, 20, 20), "green": (20, 190, 20), "blue": (20, 20, 220), "yellow": (220, 220, 20), "white": (240, 240, 240), "": (10, 10, 10)}
SIDE, CLIP = 28, 4  # pixels; seconds


def write(folder: Path, name: str, seconds: int, seed: int, step: int) -> Path:
    """A video of `seconds` colours drawn at random, and annotations of its clips, one from every `step`-th second on."""
    names = list(COLOURS)
    drawn = [names[i] for i in np.random.default_rng(seed).integers(0, len(names), seconds)]
    video = folder / f"{name}.mkv"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast", "crf": "8", "g": "4"})
        stream.height = stream.width = SIDE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 2)
        for number in range(2 * seconds):
            pixels = np.broadcast_to(np.asarray(COLOURS[drawn[number // 2]], np.uint8), (SIDE, SIDE, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    rows = []
    for start in range(0, seconds - CLIP + 1, step):
        said = [[start + i, start + i + 0.8, drawn[start + i]] for i in range(CLIP) if drawn[start + i]]
        clip = {"type": "video", "video": str(video), "video_start": float(start), "video_end": float(start + CLIP)}
        user = {"role": "user", "content": [clip, {"type": "text", "text": "", "previous": ""}]}
        rows.append([user, {"role": "assistant", "content": [{"type": "text_stream", "text_stream": said}]}])
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config() -> RunConfig:
    return RunConfig(
        out="",
        data=DataConfig(
            {"seen": DatasetConfig("")},
            LoaderConfig(SampleConfig("streaming"), max_pixels=SIDE * SIDE),
            RowShape(tokens=320, bins=2, windows=8),
            rows=4,
            lanes=4,
        ),
        steps=40,
        weights=str(tiny_path()),
        workers=Workers(threads=1),
        step=StepConfig(dtype="float32", loss_chunk=64, optimizer=OptimizerConfig(learning_rate=4e-3, b2=0.99)),
        remat="nothing",
        evaluation=EvaluationConfig({"unseen": DatasetConfig("")}, every=10),
        checkpoint=CheckpointConfig(every=1_000_000),
    )
