"""An engine between two rounds, as one file: load it and the streams go on, number for number, as if nothing had happened."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy the names of bfloat16 and its kin)
import numpy as np

from svlm_jax.errors import UserError
from svlm_jax.files import whole_file
from svlm_jax.streaming.engine import Engine, StreamHost

HEADER = "header"


def save_engine(engine: Engine, path: Path, note: Any = None) -> None:
    """Writes state, keys and what the host remembers, whole or not at all. `note` is kept beside it, as JSON. Waits for the device."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(engine.state)]
    rows = {
        index: dataclasses.asdict(dataclasses.replace(row, recent=collections.deque())) | {"recent": list(row.recent)}
        for index, row in engine._rows.items()
    }
    header = {
        "note": note,
        "settings": _settings(engine),
        "rows": rows,
        "keys": [np.asarray(jax.random.key_data(key)).tolist() for key in engine._keys],
        "leaves": [[leaf.dtype.name, leaf.shape] for leaf in leaves],
    }
    write_snapshot(path, header, [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])


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
    """Puts the streams of `save_engine` into an engine of the same settings. Raises UserError where it has others."""
    header = {"settings": "", "leaves": []} | _header(path)  # one of a run between two engines has neither
    leaves, tree = jax.tree.flatten(engine.state)
    if header["settings"] != _settings(engine) or [[leaf.dtype.name, list(leaf.shape)] for leaf in leaves] != header["leaves"]:
        raise UserError(f"{path} is of other settings or another model: go on with the same ones, or start in another folder")
    with np.load(path) as stored:
        put = [
            jax.device_put(stored[str(i)].view(np.dtype(leaf.dtype)).reshape(leaf.shape), leaf.sharding if leaf.committed else None)
            for i, leaf in enumerate(leaves)
        ]
    engine.state = jax.tree.unflatten(tree, put)
    engine.restore_rows(
        {
            int(index): StreamHost(**{**row, "recent": collections.deque(row["recent"]), "query": tuple(row["query"])})
            for index, row in header["rows"].items()
        },
        [jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32)) for key in header["keys"]],
    )
