"""A stream on disk: everything that a later round depends on, in one safetensors file, which holds arrays and text and no code.

A file appears whole or not at all: it is written under another name, flushed to the disk and renamed. One that another model or other
settings made is refused, as is one that was cut off or changed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from svlm_jax.serving.clocks import Moment
from svlm_jax.serving.events import Event
from svlm_jax.serving.limits import Refused
from svlm_jax.serving.scheduler import on_host
from svlm_jax.serving.sessions import Session, Wish
from svlm_jax.streaming.engine import SavedStream, StreamHost
from svlm_jax.streaming.layout import StreamSpec
from svlm_jax.streaming.state import state_shapes

VERSION = "1"
ID = re.compile(r"strm_[0-9a-f]{16}")
SUFFIX = ".svlm"
TICK = 1_000_000  # nanoseconds between the times of two files, at least
BITS = {2: np.dtype(np.uint16)}  # floats that NumPy itself lacks are stored by their bits


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A stream between two rounds, in the host's memory."""

    id: str
    wish: Wish
    saved: SavedStream
    about: dict[str, Any]  # JSON: source, position, counters
    events: tuple[Event, ...]
    last: int  # number of the newest event
    taken: Moment


def fingerprint(spec: StreamSpec, weights: str) -> str:
    """What a stream's state belongs to: model, settings and weights. `weights` names these."""
    return hashlib.sha256(f"{VERSION} {spec} {weights}".encode()).hexdigest()[:32]


def capture(session: Session, saved: SavedStream) -> Snapshot:
    """Of a session whose state is `saved`; called between rounds."""
    about = {
        "owner": session.owner,
        "kind": session.kind,
        "name": session.name,
        "origin": session.origin,
        "position": session.position,
        "live": session.source.live,
        "rounds": session.rounds,
        "spoken": session.spoken,
        "tokens": session.tokens,
        "skipped": session.skipped,
        "questions": list(session.questions),
    }
    events, _ = session.journal.after(0)
    return Snapshot(session.id, session.wish, on_host(saved), about, tuple(events), session.journal.last, Moment.now())


def encode(snapshot: Snapshot, print_: str) -> bytes:
    """The file. `print_` is the `fingerprint` of what it belongs to."""
    leaves = jax.tree.leaves(snapshot.saved.state)
    arrays = {f"leaf.{index:05}": _bits(np.asarray(leaf, order="C")) for index, leaf in enumerate(leaves)}
    arrays["key"] = snapshot.saved.key
    header = {
        "id": snapshot.id,
        "wish": dataclasses.asdict(snapshot.wish),
        "about": snapshot.about,
        "round": snapshot.saved.round,
        "host": snapshot.saved.row.as_json(),
        "events": [[event.id, event.data] for event in snapshot.events],
        "last": snapshot.last,
        "taken": dataclasses.asdict(snapshot.taken),
    }
    body = json.dumps(header)
    digest = hashlib.sha256(body.encode())
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return safetensors.numpy.save(arrays, {"fingerprint": print_, "stream": body, "sha256": digest.hexdigest()})


def decode(data: bytes, spec: StreamSpec, dtype: Any, print_: str) -> Snapshot:
    """Raises Refused for what is damaged, or belongs to another model or other settings."""
    try:
        arrays = safetensors.numpy.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        body, stated, known = metadata["stream"], metadata["sha256"], metadata["fingerprint"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
        raise Refused("this is no snapshot of a stream, or it was cut off") from None
    if known != print_:
        raise Refused("this snapshot belongs to another model, other weights or other settings: start the server as it was", status=409)
    digest = hashlib.sha256(body.encode())
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    if digest.hexdigest() != stated:
        raise Refused("this snapshot is damaged")
    shapes, tree = jax.tree.flatten(state_shapes(spec, 1, dtype))
    try:
        leaves = [_floats(arrays[f"leaf.{index:05}"], shape) for index, shape in enumerate(shapes)]
        header = json.loads(body)
        row = StreamHost.from_json(header["host"])
        saved = SavedStream(jax.tree.unflatten(tree, leaves), row, arrays["key"], int(header["round"]))
        events, taken = tuple(Event.of(id, data) for id, data in header["events"]), header["taken"]
        moment = Moment(float(taken["wall"]), float(taken["up"]), str(taken["boot"]))
        return Snapshot(header["id"], Wish(**header["wish"]), saved, header["about"], events, int(header["last"]), moment)
    except (KeyError, TypeError, ValueError):
        raise Refused("this is no snapshot of a stream that this version can read") from None


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(BITS[array.dtype.itemsize]) if array.dtype == ml_dtypes.bfloat16 else array


def _floats(array: np.ndarray, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    array = array.view(shape.dtype) if shape.dtype == ml_dtypes.bfloat16 else array
    if array.shape != shape.shape or array.dtype != shape.dtype:
        raise ValueError
    return array


class Shelf:
    """A folder of snapshots, one file a stream. A file's time is later than those of all before it, even if the wall clock was set back."""

    def __init__(self, folder: Path, most: int):
        """`most` snapshots are kept; the oldest goes first. Raises Refused where the folder cannot be used."""
        self.folder, self._most = folder, most
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for draft in folder.glob(".*.part"):  # of a server that was killed
                draft.unlink()
        except OSError as error:
            raise Refused(f"{folder}: {error.strerror or error}: name a folder that can be written with --state") from None

    def path(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise Refused(f"{id[:40]!r} is not the name of a stream", status=404)
        return self.folder / f"{id}{SUFFIX}"

    def write(self, id: str, data: bytes) -> None:
        """Replaces the stream's file. Refused (507) where the disk is full; the old file stays then."""
        target = self.path(id)
        draft = self.folder / f".{id}-{secrets.token_hex(4)}.part"
        try:
            with open(draft, "xb") as file:
                os.chmod(draft, 0o600)
                file.write(data)
                file.flush()
                now = max(time.time_ns(), TICK + max((when for when, _ in self._by_age()), default=0))
                os.utime(draft, ns=(now, now))
                os.fsync(file.fileno())
            os.replace(draft, target)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise Refused(f"the snapshot could not be written: {error.strerror or error}", status=507) from None
        self._forget()

    def _forget(self) -> None:
        files = self._by_age()
        for _, path in files[: max(0, len(files) - self._most)]:
            with contextlib.suppress(OSError):
                path.unlink()

    def _by_age(self) -> list[tuple[int, Path]]:
        """The time (ns) and path of each file, the oldest first."""
        found = []
        for path in self.folder.glob(f"strm_*{SUFFIX}"):
            with contextlib.suppress(OSError):  # it was removed meanwhile
                found.append((path.stat().st_mtime_ns, path))
        return sorted(found)

    def read(self, id: str) -> bytes:
        try:
            return self.path(id).read_bytes()
        except OSError:
            raise Refused(f"there is no snapshot of {id}", status=404) from None

    def remove(self, id: str) -> None:
        with contextlib.suppress(OSError):
            self.path(id).unlink()

    def ids(self, owner: str) -> list[str]:
        """The streams of an owner, by the files' headers."""
        found = []
        for path in sorted(self.folder.glob(f"strm_*{SUFFIX}")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                with open(path, "rb") as file:
                    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                if ID.fullmatch(path.stem) and json.loads(header["__metadata__"]["stream"])["about"]["owner"] == owner:
                    found.append(path.stem)
        return found
