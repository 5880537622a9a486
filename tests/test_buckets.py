"""Checkpoints in a bucket, which is served over HTTP: to there, from there, and what is left where something goes wrong."""

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from bucket_server import BucketServer
from test_convert import CONFIGS, UP, assert_same_bits, damage_tensor, read, spoil, write

from svlm_jax import cli
from svlm_jax.bucket_path import BucketPath
from svlm_jax.checkpoints import uploading
from svlm_jax.checkpoints.convert import convert
from svlm_jax.checkpoints.fetched import Fetched, byte_ranges
from svlm_jax.checkpoints.load import assemble, find, load, load_params, whole
from svlm_jax.checkpoints.plan import plan
from svlm_jax.checkpoints.safetensors_file import Mapped
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError

pytest.importorskip("gcsfs")
CONFIG = CONFIGS["qwen2_5_vl"]


@pytest.fixture(scope="module")
def objects():
    """Of the bucket, by name: (generation, bytes)."""
    with BucketServer() as server, server.used_here() as bucket:
        yield bucket.objects


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("bucket") / "hf")


@pytest.fixture(scope="module")
def forms(objects, source) -> tuple[str, str]:
    """One checkpoint in both forms."""
    convert(source, "gs://bucket/there/hf", form="hf", shard_bytes=200_000)
    convert("gs://bucket/there/hf", "gs://bucket/there/orbax")
    return "gs://bucket/there/hf", "gs://bucket/there/orbax"


def under(objects, prefix: str) -> set[str]:
    return {name for name in objects if name.startswith(prefix)}


def copied(objects, prefix: str, folder: Path) -> Path:
    for name in under(objects, prefix):
        file = folder / name.removeprefix(prefix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(objects[name][1])
    return folder


def test_from_bucket_to_bucket_no_bit_changes(objects, source, forms, tmp_path, capsys):
    assert cli.run(["convert", forms[1], "gs://bucket/back"]) == 0
    out, err = capsys.readouterr()
    assert "gs://bucket/back: 228,512 parameters, 457,024 bytes of bfloat16 in Hugging Face's form" in out and "converted 914.0 of 914.0 kB" in err
    for prefix, files in (("there/hf/", 6), ("back/", 3)):
        assert len(under(objects, prefix)) == files
        there = copied(objects, prefix, tmp_path / prefix)
        assert_same_bits(read(source), read(there))
        assert json.loads((there / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert not any(uploading.UNFINISHED in name for name in objects)
    assert not list(Path(tempfile.gettempdir()).glob(f".svlm-jax-upload-*.{os.getpid()}.part"))


def test_any_form_is_looked_at_loaded_and_served_from_there(source, forms, capsys):
    assert cli.run(["inspect", forms[0]]) == cli.run(["inspect", forms[1]]) == cli.run(["check", forms[0], "--against", forms[1]]) == 0
    out = capsys.readouterr().out
    assert "BF16 457,024 bytes" in out and "bfloat16 457,024 bytes" in out and "all 228,512 numbers are those of gs://bucket/there/orbax" in out
    wanted = load_params(source, CONFIG, stacked=True)
    for form in forms:
        jax.tree.map(np.testing.assert_array_equal, load_params(form, CONFIG, stacked=True), wanted)
    convert(tiny_path(), "gs://bucket/tiny", form="hf")
    model = load("gs://bucket/tiny")
    assert model.tokenizer.vocab_size == load(tiny_path()).tokenizer.vocab_size and model.config.name == "tiny"
    with pytest.raises(UserError, match=r"^there is nothing in gs://bucket/no: pass the directory"):
        find("gs://bucket/no")
    with pytest.raises(UserError, match=r"^gs://bucket/tiny exists already"):
        convert(source, "gs://bucket/tiny")


def test_a_shard_is_read_and_nothing_else(forms, source, monkeypatch):
    """Two quarters of parameters; what of them is neighbours in the file is asked for in one range, and all of it once."""
    chosen = [("vision", "patch_embed"), ("text", "embedding"), ("text", "layers", "qkv"), ("text", "layers", "out")]
    asked: list[int] = []
    plain = BucketPath.read_bytes

    def noted(path, start=0, end=None):
        asked.append(end - start)
        return plain(path, start, end)

    targets, locally = (plan(place, CONFIG, stacked=True) for place in (BucketPath(forms[0]), source))
    monkeypatch.setattr(BucketPath, "read_bytes", noted)
    monkeypatch.setattr("svlm_jax.checkpoints.fetched.GAP_BYTES", 1)
    with ThreadPoolExecutor(2) as pool:
        for target, local in ((a, b) for a, b in zip(targets, locally, strict=True) if a.path in chosen):
            axis = max(range(len(target.shape)), key=target.shape.__getitem__)
            size = target.shape[axis]
            quarters = [slice(start, start + size // 4) for start in (0, size // 2)]
            boxes = [(*whole(target.shape[:axis]), quarter, *whole(target.shape[axis + 1 :])) for quarter in quarters]
            asked.clear()
            found = assemble(target, boxes, Fetched(), pool)
            assert sum(asked) == sum(part.nbytes for part in found), target.path
            (everything,) = assemble(local, [whole(target.shape)], Mapped(), pool)
            for part, box in zip(found, boxes, strict=True):
                np.testing.assert_array_equal(part, everything[box])


def test_ranges_near_each_other_are_one():
    shape, box = (4, 6, 5), (slice(1, 3), slice(2, 4), slice(0, 5))
    assert byte_ranges(shape, [box], 2, gap=1).tolist() == [[80, 100], [140, 160]]
    assert byte_ranges(shape, [box], 2, gap=41).tolist() == [[80, 160]]
    assert byte_ranges(shape, [box, box, (slice(2, 3), slice(0, 6), slice(4, 5))], 2, gap=1).tolist() == [
        *([80, 100], [128, 130], [138, 160], [168, 170], [178, 180])
    ]
    assert byte_ranges((3, 0), [(slice(0, 3), slice(0, 0))], 4, gap=1).tolist() == []


def test_what_is_wrong_leaves_nothing(objects, tmp_path, forms, monkeypatch):
    broken = write(tmp_path / "hf")
    damage_tensor(broken, UP, lambda c: spoil(c, np.nan))
    for form in ("hf", "orbax"):
        with pytest.raises(UserError, match=r"up_proj\.weight holds numbers that are not finite"):
            convert(broken, "gs://bucket/out", form=form, shard_bytes=100_000)
    name = max((name for name in under(objects, "there/hf/") if name.endswith(".safetensors")), key=lambda name: len(objects[name][1]))
    generation, content = objects[name]
    try:
        objects[name] = generation, content[:-50]
        with pytest.raises(UserError, match=r"^gs://bucket/there/hf/model-\S+ is cut short \(\d+ bytes of \d+\)"):
            convert(forms[0], "gs://bucket/out")
        del objects[name]
        with pytest.raises(UserError, match=r"^gs://bucket/there/hf/model-\S+ is missing"):
            convert(forms[0], "gs://bucket/out")
    finally:
        objects[name] = generation, content
    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "upload", lambda *_: (_ for _ in ()).throw(OSError(None, "Forbidden")))
        with pytest.raises(UserError, match=r"^gs://bucket/out cannot be written \(Forbidden\): check that you may write there"):
            convert(forms[0], "gs://bucket/out")
    with monkeypatch.context() as patch:
        patch.setattr("svlm_jax.checkpoints.staging.shutil.disk_usage", lambda _: type("usage", (), {"free": 1000}))
        with pytest.raises(UserError, match=r"^gs://bucket/out needs 0\.0 GB and 0\.0 GB are free on the disk of .*: make room, or set TMPDIR"):
            convert(forms[0], "gs://bucket/out")
    assert not under(objects, "out/")


def test_a_process_that_is_killed_leaves_no_checkpoint_and_the_next_one_begins_anew(objects, source, monkeypatch):
    """Killed is: nothing is taken back. All but config.json has been sent."""
    upload = BucketPath.upload

    def fails(path, *rest):
        if path.name == "config.json":
            raise RuntimeError("killed")
        upload(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "upload", fails)
        patch.setattr(uploading.Upload, "__exit__", lambda *_: None)
        with pytest.raises(RuntimeError):
            convert(source, "gs://bucket/killed")
    left = under(objects, "killed/")
    assert "killed/UNFINISHED" in left and "killed/config.json" not in left and any("/params/" in name for name in left)
    with pytest.raises(UserError, match=r"^gs://bucket/killed is not finished: wait for what writes it, or run that again"):
        load("gs://bucket/killed")
    convert(source, "gs://bucket/killed", form="hf", dtype=ml_dtypes.bfloat16)
    assert under(objects, "killed/") == {f"killed/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")}


def test_of_two_that_write_at_one_place_the_later_has_it(objects, source, monkeypatch):
    send = uploading.Upload._send

    def other(upload, file):
        send(upload, file)
        (BucketPath("gs://bucket/two") / uploading.UNFINISHED).write_bytes(b"another")

    monkeypatch.setattr(uploading.Upload, "_send", other)
    with pytest.raises(UserError, match=r"^gs://bucket/two is being written by another process as well"):
        convert(source, "gs://bucket/two", form="hf")
    assert "two/config.json" not in under(objects, "two/") and objects["two/UNFINISHED"][1] == b"another"
