"""An engine between two rounds, as one file: load it and the streams go on, number for number, as if nothing had happened."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives numpy the names of bfloat16 and its kin)
import numpy as np

from svlm_jax.errors import UserError
from svlm_jax.files import whole_file
from svlm_jax.streaming.engine import Engine, SavedStream, StreamHost
from svlm_jax.streaming.rows import read_row

HEADER = "header"


def save_engine(engine: Engine, path: Path, note: Any = None) -> None:
    """Writes every stream's state, key and what the host remembers, whole or not at all. `note` is kept beside them, as JSON. Waits for the device."""
    taken = {row: engine.take(row) for row in engine.open_rows}
    leaves = {row: [np.asarray(leaf) for leaf in jax.tree.leaves(saved.state)] for row, saved in taken.items()}
    streams = [
        {"row": row, "host": saved.row.as_json(), "key": saved.key.tolist(), "round": saved.round, "leaves": _described(leaves[row])}
        for row, saved in taken.items()
    ]
    arrays = [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for each in leaves.values() for leaf in each]
    write_snapshot(path, {"note": note, "settings": _settings(engine), "streams": streams}, arrays)


def _described(leaves: Sequence[Any]) -> list[Any]:
    return [[np.dtype(leaf.dtype).name, list(leaf.shape)] for leaf in leaves]


def _settings(engine: Engine) -> str:
    """A digest of all that the programs are compiled for."""
    return hashlib.blake2b(repr(engine.spec).encode(), digest_size=16).hexdigest()


def write_snapshot(path: Path, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """The file itself. Raises UserError where it cannot be written; the one before is kept then."""
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with whole_file(path) as draft, draft.open("wb") as file:
        np.savez(file, **{HEADER: text}, **{str(i): array for i, array in enumerate(arrays)})  # pyright: ignore[reportArgumentType]


def read_note(path: Path) -> Any:
    """What was kept beside the engine; None where there is no snapshot. UserError for a file that is none."""
    if not path.exists():
        return None
    return _header(path)["note"]


def _header(path: Path) -> dict[str, Any]:
    try:
        with np.load(path) as stored:
            return json.loads(stored[HEADER].tobytes())
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is no snapshot ({type(error).__name__}): remove it, and the results beside it, to start anew") from None


def load_engine(engine: Engine, path: Path) -> None:
    """Has the streams of `save_engine` go on in an engine without streams. Raises UserError where it has other settings."""
    header = {"settings": "", "streams": []} | _header(path)  # one of a run between two engines has neither
    shapes, tree = jax.tree.flatten(jax.eval_shape(read_row, engine.state, 0))
    if header["settings"] != _settings(engine) or any(each["leaves"] != _described(shapes) for each in header["streams"]):
        raise UserError(f"{path} is of other settings or another model: go on with the same ones, or start in another folder")
    with np.load(path) as stored:
        arrays = (stored[str(number)] for number in itertools.count())
        for each in header["streams"]:
            leaves = [next(arrays).view(np.dtype(shape.dtype)).reshape(shape.shape) for shape in shapes]
            key = np.asarray(each["key"], np.uint32)
            engine.put(each["row"], SavedStream(jax.tree.unflatten(tree, leaves), StreamHost.from_json(each["host"]), key, each["round"]))
