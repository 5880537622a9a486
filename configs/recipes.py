"""The published recipe (StreamingVLM, arXiv 2510.09608, section 3) as presets: two stages, by size and hardware.

    python train.py stage1_7b_v5e_256 out=/shared/stage1 data.datasets.inf_streams.path=... weights=DIR
    python train.py stage2_7b_v5e_256 out=/shared/stage2 data.datasets.clips.path=... weights=DIR

Stage 1 takes Inf-Streams-Train (525 thousand chunks of 24 seconds, listed twice) and Live-WhisperX (526 thousand), stage 2 the 14,786
high-quality clips of 16 to 64 seconds. Both: 2 frames a second, at most 768 tokens a pair of frames, the first and last 512 tokens of the
previous text, vision tower frozen, AdamW at 1e-5, cosine after 3% of warm-up, one epoch of batches of 512 rows. A row has room for one sample of 720p
video, so that a batch is 512 samples, and more of smaller ones. All hardware sees the same rows in the same order.

The names are STAGE_SIZE_HARDWARE. `svlm plan NAME` gives what each takes of a chip, the least time of a step and the MFU at that; of those below
that was done with all weights trained, moments in float32, and rows full of one sample.

    4 x H100          stage1_7b   61.7 of 76.0 GB    196.3 s, 77%    benchmarks/plan_stage1_7b_h100_4.json
    4 x H100, 4 rows  stage1_7b   59.6 of 76.0 GB    1.3 s, 88%    benchmarks/plan_7b_h100_4.json
    h100x8            stage1_7b   53.4 of 76.0 GB    85.5 s, 88%    benchmarks/plan_stage1_7b_h100x8.json
    h100x8            stage2_7b   56.0 of 76.0 GB    307.9 s, 76%    benchmarks/plan_stage2_7b_h100x8.json
    v5e_256           stage1_7b   15.0 of 17.2 GB    15.4 s, 77%    benchmarks/plan_stage1_7b_v5e_256.json
    v5p_128           stage1_7b   79.5 of 102.0 GB    20.3 s, 100%    benchmarks/plan_stage1_7b_v5p_128.json
    v6e_64            stage1_7b   18.1 of 34.4 GB    13.2 s, 77%    benchmarks/plan_stage1_7b_v6e_64.json
    v5e_256           stage2_7b   14.6 of 17.2 GB    48.3 s, 76%    benchmarks/plan_stage2_7b_v5e_256.json
    v5p_128           stage2_7b   74.6 of 102.0 GB    69.8 s, 91%    benchmarks/plan_stage2_7b_v5p_128.json
    v6e_64            stage2_7b   20.9 of 34.4 GB    41.5 s, 76%    benchmarks/plan_stage2_7b_v6e_64.json
    h100x8            stage1_3b   33.7 of 76.0 GB    45.5 s, 91%    benchmarks/plan_stage1_3b_h100x8.json
    v5e_256           stage1_3b   10.1 of 17.2 GB    8.2 s, 78%    benchmarks/plan_stage1_3b_v5e_256.json
    v5p_128           stage1_3b   56.3 of 102.0 GB    11.1 s, 100%    benchmarks/plan_stage1_3b_v5p_128.json
    v6e_64            stage1_3b   11.0 of 34.4 GB    7.1 s, 78%    benchmarks/plan_stage1_3b_v6e_64.json
    h100x8            stage2_3b   39.0 of 76.0 GB    179.0 s, 77%    benchmarks/plan_stage2_3b_h100x8.json
    v5e_256           stage2_3b   9.0 of 17.2 GB    28.1 s, 77%    benchmarks/plan_stage2_3b_v5e_256.json
    v5p_128           stage2_3b   51.1 of 102.0 GB    40.0 s, 93%    benchmarks/plan_stage2_3b_v5p_128.json
    v6e_64            stage2_3b   13.4 of 34.4 GB    24.1 s, 77%    benchmarks/plan_stage2_3b_v6e_64.json
    v5p_512           stage1_72b  67.1 of 102.0 GB    60.2 s, 75%    benchmarks/plan_stage1_72b_v5p_512.json
"""

import dataclasses
import functools
from collections.abc import Callable

from svlm_jax.data.loader import LoaderConfig
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import DataConfig, DatasetConfig, Workers
from svlm_jax.data.samples import SampleConfig
from svlm_jax.training.config import CheckpointConfig, HostsConfig, MeshConfig, RunConfig
from svlm_jax.training.optimizer import OptimizerConfig
from svlm_jax.training.step import StepConfig

ROWS = 512  # of a batch, over all chips
SAMPLES = {"stage1": 2 * 525_000 + 526_000, "stage2": 14_786}
SHAPES = {
    "stage1": RowShape(tokens=20_480, bins=28, windows=45),  # 24 seconds of 720p video: 17,280 tokens, and up to 3,200 of text
    "stage2": RowShape(tokens=49_152, bins=64, windows=45),  # 64 seconds: 46,080 tokens
}
MODELS = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct", "72b": "Qwen/Qwen2.5-VL-72B-Instruct"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Chips, and how a run lies on them. One row of each chip goes through the model at a time."""

    topology: str  # as `svlm plan` takes it
    hosts: int
    mesh: MeshConfig
    remat: str


LAYOUTS: dict[str, dict[str, Layout]] = {
    "stage1": {
        "h100x8": Layout("h100:8", 1, MeshConfig(fsdp=8), "gate_up"),
        "v5e_256": Layout("v5e-256", 64, MeshConfig(data=4, fsdp=64), "full"),
        "v5p_128": Layout("v5p-128", 16, MeshConfig(data=2, fsdp=32), "products"),
        "v6e_64": Layout("v6e-64", 16, MeshConfig(data=2, fsdp=32), "full"),
    },
    "stage2": {
        "h100x8": Layout("h100:8", 1, MeshConfig(fsdp=8), "full"),
        "v5e_256": Layout("v5e-256", 64, MeshConfig(data=2, fsdp=32, sequence=4), "full"),
        "v5p_128": Layout("v5p-128", 16, MeshConfig(data=2, fsdp=32), "gate_up"),
        "v6e_64": Layout("v6e-64", 16, MeshConfig(fsdp=32, sequence=2), "full"),
    },
}
LARGE = {"v5p_512": Layout("v5p-512", 64, MeshConfig(data=4, fsdp=64), "full")}  # of the 72B model


def _datasets(stage: str) -> dict[str, DatasetConfig]:
    if stage == "stage2":
        return {"clips": DatasetConfig("data/high_quality_clips.jsonl", "data/videos")}
    streams = DatasetConfig("data/inf_streams_train.jsonl", "data/videos")
    return {"inf_streams": streams, "inf_streams_again": streams, "live_whisperx": DatasetConfig("data/live_whisperx.jsonl", "data/videos")}


def _make(stage: str, size: str, layout: Layout) -> RunConfig:
    m = layout.mesh
    return RunConfig(
        out=f"runs/{stage}_{size}",
        data=DataConfig(
            _datasets(stage),
            LoaderConfig(SampleConfig("published", fps=2.0, text_sink=512, text_sliding=512)),
            SHAPES[stage],
            rows=ROWS,
            lanes=64,
            epochs=1,
        ),
        steps=-(-SAMPLES[stage] // ROWS),
        model=size,
        weights=MODELS[size],
        mesh=layout.mesh,
        hosts=HostsConfig(count=layout.hosts),
        workers=Workers(threads=2),
        step=StepConfig(accumulate=ROWS // (m.data * m.fsdp), optimizer=OptimizerConfig(learning_rate=1e-5, warmup=0.03)),
        remat=layout.remat,
        checkpoint=CheckpointConfig(every=200),
    )


def _all() -> dict[str, tuple[str, str, Layout]]:
    """(stage, size, layout) by name."""
    found = {}
    for stage, layouts in LAYOUTS.items():
        found |= {f"{stage}_{size}_{where}": (stage, size, layout) for size in ("3b", "7b") for where, layout in layouts.items()}
    return found | {f"stage1_72b_{where}": ("stage1", "72b", layout) for where, layout in LARGE.items()}


PRESETS: dict[str, Callable[[], RunConfig]] = {name: functools.partial(_make, *parts) for name, parts in _all().items()}
TOPOLOGIES = {name: layout.topology for name, (_, _, layout) in _all().items()}
