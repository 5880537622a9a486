"""Files written past the system's cache: every byte is there, whatever the sizes of what was written, on any file system."""

import errno
import os
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svlm_jax.checkpoints import straight
from svlm_jax.checkpoints.straight import ALIGNED, StraightFile

PART = 4 * ALIGNED
SIZES = st.lists(st.one_of(st.integers(0, 3 * PART), st.sampled_from([ALIGNED - 1, ALIGNED, ALIGNED + 1, PART, PART + ALIGNED, PART + ALIGNED + 1])))


def write(path, sizes: list[int]) -> bytes:
    data = np.random.default_rng(0).integers(0, 256, sum(sizes), dtype=np.uint8)
    with StraightFile(path) as file:
        for piece in np.split(data, np.cumsum(sizes)[:-1]) if sizes else []:
            file.room(len(piece))[:] = piece
    return data.tobytes()


@pytest.fixture(params=["straight", "refused when opened", "refused when written"])
def system(request, monkeypatch):
    """With O_DIRECT where the disk of the tests has it, and with what file systems say that do not."""
    monkeypatch.setattr(straight, "PART", PART)
    if request.param == "refused when opened":
        really = os.open

        def refuse(path, flags, *rest):
            if flags & getattr(os, "O_DIRECT", 0):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return really(path, flags, *rest)

        monkeypatch.setattr(os, "open", refuse)
    elif request.param == "refused when written":
        plainly, first = straight._write, []

        def refuse_first(file, part, offset):
            if not first:
                first.append(file)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            plainly(file, part, offset)

        monkeypatch.setattr(straight, "_write", refuse_first)
        monkeypatch.setattr(StraightFile, "_open_straight", staticmethod(lambda path: os.open(path, os.O_WRONLY)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES)
def test_every_byte_is_there(system, tmp_path, sizes):
    sizes = [PART, *sizes]
    assert write(tmp_path / "file", sizes) == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("sizes", [[100 * ALIGNED], [10], [PART + ALIGNED] * 3], ids=["a whole part", "the end", "one of many parts"])
def test_a_disk_that_takes_no_more_is_an_error(monkeypatch, tmp_path, sizes):
    monkeypatch.setattr(straight, "PART", PART)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "file", sizes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_given_up_closes_its_files(tmp_path):
    there = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), StraightFile(tmp_path / "file") as file:
        file.write(b"a")
        raise ZeroDivisionError
    assert set(os.listdir("/proc/self/fd")) == there
