"""Saving and restoring a run (Orbax): in the background, whole or not there, with the place in the data inside."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from svlm_jax import storage
from svlm_jax.checkpoints.hub_config import TokenIds, write_config
from svlm_jax.checkpoints.run_form import MODEL, described_in
from svlm_jax.checkpoints.save import copy_companions, write_json
from svlm_jax.checkpoints.staging import staged
from svlm_jax.config import ModelConfig
from svlm_jax.data.pipeline import merge_states
from svlm_jax.errors import UserError
from svlm_jax.storage import Place
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.training import hosts
from svlm_jax.training.config import CheckpointConfig
from svlm_jax.training.step import TrainState
from svlm_jax.training.trainable import Flat, unflatten
from svlm_jax.types import Params

PARTS = ("trained", "frozen", "progress")  # of a saved state, each to be had without the others


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _parts(state: TrainState) -> dict[str, Flat]:
    """The state as flat dicts, so that files name what is in them."""
    progress = {"step": state.step, "skipped": state.skipped, "history": state.history, "moments": state.moments}
    flat = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(progress)}
    return {"trained": state.trained, "frozen": state.frozen, "progress": flat}


def _state(parts: dict[str, Flat], like: TrainState) -> TrainState:
    progress = {"step": like.step, "skipped": like.skipped, "history": like.history, "moments": like.moments}
    filled = jax.tree_util.tree_map_with_path(lambda path, _: parts["progress"][_name(path)], progress)
    return TrainState(trained=parts["trained"], frozen=parts["frozen"], **filled)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. All processes call everything, together."""

    manager: ocp.CheckpointManager

    @classmethod
    def open(cls, directory: str | Path, config: CheckpointConfig) -> "Checkpoints":
        """Those in `directory`, which is made if need be; it may be in a bucket."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, keep_period=config.keep_every or None, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        return cls(ocp.CheckpointManager(storage.directory(str(directory)), options=options))

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Begins to write the state after `step` batches; what is written is a copy, so the state may be donated at once."""
        parts = {name: ocp.args.StandardSave(part, _in_layers(part)) for name, part in _parts(state).items() if part}
        places = hosts.gathered(data)
        place = data if len(places) == 1 else merge_states(places)
        self.manager.save(step, args=ocp.args.Composite(data=ocp.args.JsonSave(place), **parts), force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, place in the data) after `step` batches, on the devices of `like`, the state's shapes with shardings."""
        parts = _parts(like)
        asked = {name: ocp.args.StandardRestore(part) for name, part in parts.items() if part}
        try:
            found = self.manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore(), **asked))
        except (ValueError, KeyError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(f"the checkpoint at step {step} is not of a run with these settings ({reason}): choose another `out`") from error
        return _state({name: found[name] if part else {} for name, part in parts.items()}, like), found["data"]

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def _in_layers(part: Flat) -> dict[str, ocp.SaveArgs]:
    """Layers that are stacked in memory are chunks of their own on the disk, so that one is read without the others."""
    return {path: ocp.SaveArgs(shard_axes=(0,) if path.startswith("text.layers.") else ()) for path in part}


def describe(out: Path, model: ModelConfig, source: Place | None, tokenizer: Place, dtype: str) -> None:
    """Writes what a run's checkpoints are read with, `out`/model: config.json, tokenizer files. What is there already stays.

    Args:
      source: the checkpoint that the run starts from, whose config.json is taken; without one, `model` is written down.
      tokenizer: the directory of the tokenizer's files.
      dtype: of the products, which config.json states as the weights' dtype.
    """
    if (out / MODEL).exists():
        return
    with staged(out / MODEL) as staging:
        copy_companions(tokenizer, staging.folder)
        if source is not None:
            (staging.folder / "config.json").write_bytes((described_in(source) / "config.json").read_bytes())
        else:
            write_json(staging.folder / "config.json", write_config(model, TokenIds.of(Tokenizer.load(tokenizer)), dtype=dtype))


def restore_params(directory: Path, step: int | None = None) -> Params:
    """The parameters alone of a checkpoint (the last one by default), as the model takes them, on the default device.

    Adapters stay beside the weights that they belong to (`lora_a`, `lora_b`); `training.lora.merged` adds them.
    """
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("trained", "frozen")}
    with ocp.CheckpointManager(directory.resolve(), item_handlers=handlers) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            raise UserError(f"{directory} holds no checkpoint{'' if step is None else f' of step {step}'}")
        there = [name for name in handlers if (Path(directory) / str(step) / name).exists()]
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        flat: Flat = {}
        for name in there:
            shapes = manager.item_metadata(step)[name]
            like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for path, leaf in dict(shapes).items()}
            flat |= manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(like)}))[name]
    return unflatten(flat)
