"""Paths in buckets. What is done with them is seen in `test_train`, where a run lives in one."""

import pytest

from svlm_jax import storage
from svlm_jax.data.loader import Source
from svlm_jax.errors import UserError


def test_names_in_folders():
    assert storage.join("videos", "a/b.mp4") == "videos/a/b.mp4"
    assert storage.join("/videos/", "/elsewhere/b.mp4") == "/elsewhere/b.mp4"
    assert storage.join("gs://bucket/videos/", "a/b.mp4") == "gs://bucket/videos/a/b.mp4"
    assert storage.join("/videos", "gs://bucket/b.mp4") == "gs://bucket/b.mp4"
    assert Source([], "gs://bucket/videos").path("a.mp4") == "gs://bucket/videos/a.mp4"
    assert Source([], "gs://bucket/videos").path("https://host/a.mp4") == "https://host/a.mp4"


def test_what_is_here_is_not_copied(tmp_path):
    file = tmp_path / "a.jsonl"
    assert storage.local_copy(file) == file and storage.directory(str(tmp_path)) == tmp_path


def test_a_bucket_without_its_library(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for use in (storage.local_copy, storage.opened, storage.directory, storage.Mirror):
        with pytest.raises(
            UserError, match=r"^paths that begin with gs:// need the package gcsfs: pip install 'svlm-jax\[gcs\]', or mount the bucket$"
        ):
            use("gs://bucket/a")
