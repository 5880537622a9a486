"""Every setting of a training run, as one tree of frozen dataclasses. Presets are in configs/; `a.b=c` changes one setting."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svlm_jax.configs.models import MODELS
from svlm_jax.data.pipeline import DataConfig, DatasetConfig, Workers
from svlm_jax.errors import UserError
from svlm_jax.sharding import MESH_AXES
from svlm_jax.training.remat import check_policy
from svlm_jax.training.step import StepConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis (`sharding`); one of them may be -1: all that the others leave."""

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis: devices. UserError where they do not make up `devices`."""
        sizes = dataclasses.asdict(self)
        text = " x ".join(f"{axis} {sizes[axis]}" for axis in MESH_AXES)
        if sum(size == -1 for size in sizes.values()) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            raise UserError(f"a mesh of {text}: axes are at least 1, and one alone may be -1")
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            raise UserError(f"a mesh of {text} does not make up the {devices} devices that are here: change an axis, or make one -1")
        return sizes


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every: int = 500  # steps; the last step is saved always
    keep: int = 2  # the last ones
    keep_every: int = 0  # and for ever those at multiples of so many steps; 0: none

    def __post_init__(self):
        if self.every < 1 or self.keep < 1 or self.keep_every < 0:
            raise UserError(f"checkpoint.every {self.every} and .keep {self.keep} must be at least 1, .keep_every {self.keep_every} at least 0")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out data, evaluated after the last step and, if so told, on the way. Laid out and packed as the training data are."""

    datasets: Mapping[str, DatasetConfig] = dataclasses.field(default_factory=dict)  # none: no evaluation
    every: int = 0  # steps; 0: after the last one only
    rows: int = 0  # of the data sets at most, evenly spread; 0: all

    def __post_init__(self):
        if min(self.every, self.rows) < 0:
            raise UserError(f"evaluation.every {self.every} and .rows {self.rows} must not be negative")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Where the numbers go besides `metrics.jsonl`."""

    tensorboard: bool = False  # event files in out/tensorboard
    wandb: str = ""  # the name of a project there


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Processes that train together. On TPU pods and under Slurm `count` is enough: who is who is known there."""

    count: int = 1  # that are to be there; anything else is an error at the start
    coordinator: str = ""  # address:port of process 0, where no cluster tells it
    index: int | None = None  # of this process, with `coordinator`
    timeout: int = 120  # seconds to wait for the others


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run. What is in `out` already is gone on with."""

    out: str  # directory of checkpoints, metrics and the resolved config; gs://BUCKET/... too
    data: DataConfig
    steps: int  # batches to take
    model: str = "7b"  # a name of `configs.models`, for random weights; not looked at with `weights`
    weights: str = ""  # a checkpoint to start from: a Hugging Face directory, org/name, or the `out` or `out/checkpoints/STEP` of another run
    seed: int = 0  # of random weights and adapters
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    workers: Workers = dataclasses.field(default_factory=Workers)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    attention: str = "auto"  # or splash, cudnn, xla
    remat: str = "gate_up"  # of decoder layers; `training.remat` lists the names
    vision_remat: str = "full"  # of vision blocks, where they are trained
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    profile_steps: str = ""  # `10:13` writes a trace of steps 10, 11 and 12 into out/profile

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if not self.weights and self.model not in MODELS:
            raise UserError(f"model {self.model!r} is unknown: {', '.join(MODELS)}")
        check_policy(self.remat)
        check_policy(self.vision_remat)
        self.profiled  # noqa: B018  (raises where it cannot be read)

    @property
    def profiled(self) -> range:
        """The steps to trace."""
        if not self.profile_steps:
            return range(0)
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise UserError(f"profile_steps {self.profile_steps!r} must be FIRST:LAST, such as 10:13")
        return range(int(first), int(last))


def resolve(preset: str, overrides: Sequence[str]) -> RunConfig:
    """The preset of that name in configs/ (or the Python file), with its overrides."""
    from svlm_jax.configs.recipes import PRESETS

    if preset.endswith(".py"):
        spec = importlib.util.spec_from_file_location("preset", preset)
        if spec is None or spec.loader is None or not Path(preset).is_file():
            raise UserError(f"there is no configuration {preset}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif preset in PRESETS:
        return override(PRESETS[preset](), overrides)
    else:
        try:
            module = importlib.import_module(f"svlm_jax.configs.{preset}")
        except ModuleNotFoundError as error:
            files = (Path(str(importlib.import_module("svlm_jax.configs").__path__[0]))).glob("sft_*.py")
            known = [*sorted(f.stem for f in files), *PRESETS]
            raise UserError(f"there is no preset {preset!r} in configs: {', '.join(known)}, or the path of a file of your own") from error
    return override(module.config(), overrides)


def override(config: Any, changes: Sequence[str]) -> Any:
    """The config with `a.b=c` changes. UserError for a key that is not there or a value of another kind."""
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"{change!r} is no setting: write key=value, such as steps=100")
        config = _replace(config, key.split("."), text, key)
    return config


def _replace(node: Any, path: list[str], text: str, key: str) -> Any:
    name, *rest = path
    if isinstance(node, Mapping):  # data sets by name: a new one begins with its path
        inner = node.get(name)
        if inner is None:
            if rest != ["path"]:
                raise UserError(f"{key}: there is no data set {name!r}: begin with {key.rsplit('.', 1)[0]}.path=FILE")
            return {**node, name: DatasetConfig(text)}
        return {**node, name: _replace(inner, rest, text, key)}
    hints = typing.get_type_hints(type(node)) if dataclasses.is_dataclass(node) else {}
    if name not in hints:
        raise UserError(f"{key}: there is no setting {name!r} here: {', '.join(hints) or 'it has no parts'}")
    value = getattr(node, name)
    new = _replace(value, rest, text, key) if rest else _parse(text, hints[name], key)
    return dataclasses.replace(node, **{name: new})  # type: ignore[type-var]


def _parse(text: str, hint: Any, key: str) -> Any:
    """The text as a value of the field's type."""
    kinds = [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = list(typing.get_args(hint))
    if str in kinds or typing.get_origin(hint) is typing.Literal:
        return text
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is tuple:
            return tuple(text.split(",")) if not isinstance(value, tuple | list) else tuple(value)
        if origin is float and type(value) in (int, float):
            return float(value)
        if origin is types.NoneType and value is None:
            return None
        if origin in (int, bool) and type(value) is origin:
            return value
    raise UserError(f"{key}={text}: a value of type {wanted} is wanted")


def as_json(config: Any) -> str:
    """The resolved config, to be saved with the run."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
