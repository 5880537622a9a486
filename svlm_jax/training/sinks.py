"""Where a run's numbers go besides its file of JSON lines: TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from svlm_jax.errors import UserError
from svlm_jax.training.config import ReportConfig, RunConfig, as_json


@runtime_checkable
class Sink(Protocol):
    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def require(config: ReportConfig) -> None:
    """UserError where something is asked for that is not installed."""
    for asked, package, extra in ((config.tensorboard, "tensorboardX", "tensorboard"), (config.wandb, "wandb", "wandb")):
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(f"report.{extra} needs the package {package}: pip install 'svlm-jax[{extra}]', or leave it out")


def open_sinks(config: RunConfig, out: Path, after: int) -> list[Sink]:
    """Those that the config asks for. What they were told of steps behind `after` is going to come again."""
    require(config.report)
    sinks: list[Sink] = []
    if config.report.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard", after))
    if config.report.wandb:
        sinks.append(Wandb(config, out))
    return sinks


def numbers_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record, those of nested ones as `outer/inner`."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            found[f"{prefix}{name}"] = float(value)
    return found


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, after: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library's imports
            import tensorboardX
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=after + 1 if after else None, filename_suffix=f".after{after}")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases that a restart goes on with: its id is kept in `out`/wandb_id."""

    def __init__(self, config: RunConfig, out: Path):
        import wandb

        kept = out / "wandb_id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:12])
        settings = json.loads(as_json(config))
        self._run: Any = wandb.init(project=config.report.wandb, id=kept.read_text(), resume="allow", dir=str(out), config=settings)
        self._run.define_metric("*", step_metric="step")  # steps come again after a restart

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()
