"""Captions from Python: the public names, the order and delay of rounds, settings, and what is refused."""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import svlm_jax
from svlm_jax import api, programs
from svlm_jax.api import Commentary
from svlm_jax.captions import Caption
from svlm_jax.commands.flags import add_arguments, stream_settings
from svlm_jax.config import StreamConfig
from svlm_jax.data.video import TruncatedVideo, read_rounds
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError
from svlm_jax.streaming.engine import Engine

CLIP = sample_path()


@pytest.fixture(scope="module")
def model():
    return svlm_jax.load(tiny_path())


@pytest.fixture
def truncated(tmp_path):
    """The sample clip, the last two fifths of its bytes lost."""
    path = tmp_path / "cut.mp4"
    path.write_bytes(CLIP.read_bytes()[: CLIP.stat().st_size * 3 // 5])
    return path


def lock_step(commentary: Commentary, model) -> list[tuple[int, ...]]:
    """Every round's tokens from the engine alone, each round awaited before the next is sent."""
    engine, s = Engine(model.params, commentary.spec, model.tokenizer), commentary.spec.stream
    engine.open()
    out = []
    for video in read_rounds(CLIP, fps=s.fps, chunk_seconds=s.chunk_seconds, size=(commentary.spec.height, commentary.spec.width)):
        frames = jax.numpy.asarray(np.moveaxis(video.frames, -1, 1)[None])
        tokens = engine.step(frames, {0: (video.start, video.end)}).tokens()
        engine.note(tokens)
        out.append(tuple(tokens[0]))
    return out


# The package


def python(code: str, **environment: str) -> str:
    command, env = [sys.executable, "-W", "error::ImportWarning", "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_is_fast_and_imports_nothing():
    code = "import sys, time; t = time.perf_counter(); import svlm_jax; print(time.perf_counter() - t, {'jax', 'numpy'} & {*sys.modules})"
    seconds, heavy = zip(*(python(code).split() for _ in range(3)), strict=True)
    assert min(map(float, seconds)) < 0.3
    assert set(heavy) == {"set()"}


def test_names_touch_no_device():
    code = "import svlm_jax; print([getattr(svlm_jax, name).__name__ for name in svlm_jax.__all__])"
    names = python(code, JAX_PLATFORMS="no_such_platform")  # the first use of a device would fail
    assert names == str(svlm_jax.__all__)


def test_generate_is_the_function_even_where_its_module_was_imported_first():
    assert python("import svlm_jax.types, svlm_jax.generate; print(svlm_jax.generate.__name__, callable(svlm_jax.generate))") == "generate True"
    with pytest.raises(AttributeError, match="no attribute 'captions_of'"):
        svlm_jax.captions_of  # noqa: B018


# Captions


def test_captions_are_those_of_the_engine_and_of_a_second_run(model):
    commentary = Commentary(CLIP, model)
    said = list(commentary)
    assert [one.tokens for one in said] == lock_step(commentary, model)
    assert [(one.caption.start, one.caption.end) for one in said] == [(r, r + 1) for r in range(12)]
    assert list(svlm_jax.stream(CLIP, model)) == [one.caption for one in said]
    cached = [one.cached for one in said]
    assert cached == sorted(cached) and all(0 < one.cache_fill < 1 and one.speed > 0 and not one.broken for one in said)


def test_start_and_duration(model):
    captions = list(svlm_jax.stream(CLIP, model, start=2.5, duration=2))
    assert [(c.start, c.end) for c in captions] == [(2.5, 3.5), (3.5, 4.5)]
    assert all(isinstance(c, Caption) for c in captions)


def test_silence_is_yielded_too(model):
    end = Commentary(CLIP, model).spec.prompt.im_end
    silent = {**model.params, "text": {**model.params["text"]}}
    head = silent["text"]["head"]
    silent["text"]["head"] = head.at[0, end].set(1e4)  # the first feature is one constant for every token
    quiet = api.LoadedModel(model.config, silent, model.tokenizer, model.path)
    assert [c.text for c in svlm_jax.stream(CLIP, quiet, duration=3)] == ["", "", ""]


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "windows", "vision_window": 3, "text_sink": 8, "text_sliding": 8},
        {"text_sink": None, "text_sliding": None, "text_window": 2, "vision_window": 2, "text_capacity": 512},
    ],
    ids=["windows", "unbounded text"],
)
def test_rounds_that_depend_on_words_are_not_sent_ahead_of_them(model, settings):
    commentary = Commentary(CLIP, model, **settings)
    assert [one.tokens for one in commentary] == lock_step(commentary, model)


def test_a_live_source_does_not_wait_for_its_next_round(model):
    """The caption of a round comes before the next round's frames are asked for."""
    commentary, order = Commentary(CLIP, model, duration=3), []
    commentary.live = True
    commentary.load()
    first, rest = commentary._first, commentary._rounds

    def watched():
        for item in rest:
            order.append("frames")
            yield item

    commentary._first, commentary._rounds = first, watched()
    for _ in commentary:
        order.append("caption")  # noqa: PERF401
    assert order == ["caption", "frames", "caption", "frames", "caption"]


def test_a_stream_that_is_left_ends_its_reading(model):
    captions = svlm_jax.stream(CLIP, model)
    assert next(captions).start == 0
    assert "read-ahead" in {thread.name for thread in threading.enumerate()}
    captions.close()  # type: ignore[attr-defined]
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}


def test_full_mode_has_room_for_the_whole_file(model):
    commentary = Commentary(CLIP, model, mode="full", start=8.0)
    assert commentary.spec.stream.capacity_rounds == 5
    assert len(list(commentary)) == 4


def test_a_capacity_that_is_reached_is_told_after_the_captions(model):
    captions, commentary = [], svlm_jax.stream(CLIP, model, mode="full", capacity_rounds=5)
    with pytest.raises(UserError, match="--mode full holds 5 rounds"):
        for caption in commentary:
            captions.append(caption)  # noqa: PERF402
    assert [c.start for c in captions] == [0, 1, 2, 3, 4]


def test_questions_stand_in_the_round_of_their_second(model):
    plain = [one.cached for one in Commentary(CLIP, model, duration=5, max_new_tokens=1)]
    questions = [(2.5, "Who has the ball?"), (2, "Where?")]
    asked = [one.cached for one in Commentary(CLIP, model, duration=5, max_new_tokens=1, questions=questions)]
    question = len(model.tokenizer.encode_plain("Who has the ball? Where?"))
    assert [b - a for a, b in zip(plain, asked, strict=True)] == [0, 0, question, question, question]
    with pytest.raises(UserError, match=r"the question 'Late\?' at 12 s is outside of what is captioned, 0 s to 12 s"):
        Commentary(CLIP, model, questions=[(12, "Late?")])


def test_a_truncated_video_gives_what_can_be_read(model, truncated):
    captions, whole = [], list(svlm_jax.stream(CLIP, model))
    with pytest.raises(TruncatedVideo, match=r"cut\.mp4: .*fetch or record it again"):
        for caption in svlm_jax.stream(truncated, model):
            captions.append(caption)  # noqa: PERF402
    assert 3 <= len(captions) < 12
    assert captions[:-1] == whole[: len(captions) - 1]


# What is refused, at the call


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="there is no setting 'temprature': the settings are"):
        svlm_jax.stream(CLIP, tiny_path(), temprature=0)
    with pytest.raises(UserError, match="--text-window must be at least 2"):
        svlm_jax.stream(CLIP, tiny_path(), text_window=1)


def test_a_missing_video_is_named_at_the_call():
    with pytest.raises(UserError, match=r"no\.mp4: there is no such file"):
        svlm_jax.stream("no.mp4")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"vision_window": 10**9}, "--vision-window, --text-window, --max-new-tokens, --max-pixels, --fps or --text-sink and --text-sliding"),
        ({"mode": "full", "capacity_rounds": 10**9}, "--capacity-rounds, --max-new-tokens, --max-pixels"),
        ({"text_sink": None, "text_sliding": None, "text_capacity": 10**12}, "--text-capacity"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(monkeypatch, settings, names):
    monkeypatch.setattr(api.checkpoint, "load_params", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(
        UserError, match=r"needs [\d,.]+ GiB \(weights 0\.7 MiB, cache [\d,.]+ GiB\), with [\d.]+ GiB of memory free"
    ) as told:
        svlm_jax.stream(CLIP, tiny_path(), **settings)
    assert names in str(told.value)


def test_memory_is_counted_exactly(monkeypatch):
    commentary = Commentary(CLIP, tiny_path())
    state = programs.tree_bytes(programs.state_shapes(commentary.spec, 1, commentary.dtype))
    model = commentary.checkpoint
    assert model is not None and model.nbytes == programs.tree_bytes(svlm_jax.load(tiny_path()).params)
    monkeypatch.setattr(programs, "free_memory", lambda: state + model.nbytes)
    Commentary(CLIP, tiny_path())
    monkeypatch.setattr(programs, "free_memory", lambda: state + model.nbytes - 1)
    with pytest.raises(UserError, match="lower --vision-window"):
        Commentary(CLIP, tiny_path())
    monkeypatch.setattr(programs, "free_memory", lambda: model.nbytes - 1)
    with pytest.raises(UserError, match="use a smaller model"):
        Commentary(CLIP, tiny_path())


def test_what_a_round_works_with_must_fit_too(monkeypatch, model):
    commentary = Commentary(CLIP, model, duration=1)  # one kind of round: no program is left compiling
    commentary.load()
    monkeypatch.setattr(programs, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"a round needs [\d.]+ MiB to work with, and 0\.0 MiB of memory are free: lower --chunk"):
        commentary.prepare()
    commentary.close()


def test_weights_from_elsewhere(tmp_path, model):
    folder = shutil.copytree(model.path, tmp_path / "tuned")
    (folder / "tokenizer.json").unlink()
    loaded = svlm_jax.load(model.path, weights=folder, dtype="float32")
    assert jax.tree.leaves(loaded.params)[0].dtype == np.float32
    np.testing.assert_array_equal(loaded.params["text"]["head"], model.params["text"]["head"].astype(np.float32))


def test_every_stream_setting_is_a_flag():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert stream_settings(parser.parse_args([])) == {}  # what is not given is the model's to say
    flags = {action.dest for action in parser._actions}
    assert {field.name for field in dataclasses.fields(StreamConfig)} - flags == {"question_capacity"}  # it grows by itself
