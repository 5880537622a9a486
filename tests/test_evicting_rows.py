"""Rows with a window: what a model makes of them is what it makes of the stream that they are, keys and values of old words included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from forced import forced_engine, turns_of

from svlm_jax.config import StreamConfig
from svlm_jax.data import eviction
from svlm_jax.data.annotations import Annotation, Question, UnusableRow, Word
from svlm_jax.data.packing import Loaded, OpenRow, RowShape, check_fits, make_batch
from svlm_jax.data.patches import window_patches
from svlm_jax.data.samples import SampleConfig, lay_out, make_script
from svlm_jax.errors import UserError
from svlm_jax.sharding import make_mesh
from svlm_jax.streaming.prompt import PromptLayout
from svlm_jax.streaming.visible import visible
from svlm_jax.training.attention import Job, choose
from svlm_jax.training.flops import operations
from svlm_jax.training.forward import Recipe, hidden_states
from svlm_jax.training.placement import Placement

ROUNDS, WINDOW = 9, 3
WATCHED = range(0, 256, 5)
SHAPE = RowShape(tokens=1300, bins=24, windows=4, samples=4, memory=160, reach=128)
SAMPLE = SampleConfig("streaming", text_sink=6, text_sliding=40, window=WINDOW)


def clip(start: float, texts: list[str], **how) -> Annotation:
    words = tuple(Word(start + i + 0.2, start + i + 0.8, text) for i, text in enumerate(texts) if text)
    return Annotation("a.mp4", start, start + ROUNDS, how.pop("query", ""), how.pop("previous", ""), words, **how)


CLIPS = (
    clip(20.0, ["red passes", "", "goal by 7!", "1-0", "to blue", "", "", "it is 1-0", "wide"], previous="Kick-off. blue passes", query="Comment"),
    clip(
        0.0,
        ["a", "b c d", "", "e f", "", "g h i j", "k", "", "l"],
        previous="red passes to blue " * 12,  # more than there is room for, once what is said has joined it
        questions=(Question(0, 1.5, "Who?", "Blue."), Question(0, 6.5, "And now?", "Red.")),
    ),
)


def loaded(annotation: Annotation, family: str, config: SampleConfig = SAMPLE) -> Loaded:
    vision, tokenizer = small.FAMILIES[family](1024).vision, small.tokenizer()
    size = 2 * vision.merged_patch_size, 3 * vision.merged_patch_size
    row = lay_out(annotation, config, size, tokenizer, PromptLayout.from_tokenizer(tokenizer), vision)
    frames = np.concatenate([pictures(size, index) for index in range(ROUNDS)])
    return Loaded("a", row, window_patches(frames, vision), size)


def pictures(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, *size, 3), dtype=np.uint8)


def streamed(monkeypatch, item: Loaded, annotation: Annotation, family: str) -> list[np.ndarray]:
    """The logits of WATCHED for every label, as an engine has them that says the row's words; by turns."""
    turns = turns_of(item.sample, PromptLayout.from_tokenizer(small.tokenizer()))
    stream = StreamConfig(
        vision_window=WINDOW,
        text_window=WINDOW,
        text_sink=SAMPLE.text_sink,
        text_sliding=SAMPLE.text_sliding,
        max_new_tokens=max(map(len, turns)),
        query=annotation.query,
        previous_text=previous(item),
    )
    engine, found = forced_engine(monkeypatch, stream, turns, family=family, layers=3, depth=2, watch=WATCHED), []
    engine.open(0)
    for index, turn in enumerate(make_script(annotation, SAMPLE).turns):
        frames = pictures(item.frame_hw, index).transpose(0, 3, 1, 2)[None]
        said = engine.step(frames, {0: (turn.start, turn.end)}, {0: turn.question} if turn.question else None)
        engine.note(said.tokens())
        found.append(np.asarray(said.turn.watched)[0, : len(turns[index])])
    facts, seen = item.sample.eviction, visible(engine.state)
    assert facts is not None
    last = facts.round == ROUNDS - 1
    there = (facts.first < ROUNDS) & (facts.stop == ROUNDS)
    row = item.sample.tokens
    window = row[facts.start[last][0] : -1]  # the last token is sampled, and not yet run
    assert sorted(seen.tokens.tolist()) == sorted([*row[facts.source[there]].tolist(), *window.tolist()])
    begin = len(seen.tokens) - len(window)
    assert seen.tokens[begin:].tolist() == window.tolist()
    first = np.flatnonzero(last)[2:-1]  # those of the round itself: before them is what ends the turn before
    np.testing.assert_array_equal(
        seen.positions[:, -len(first) :].T * engine.spec.unit, item.sample.positions[first] - facts.shift[first][:, None]
    )
    return found


def previous(item: Loaded) -> str:
    """The previous text that a row begins with, once it is cut."""
    p, tokens = PromptLayout.from_tokenizer(small.tokenizer()), item.sample.tokens.tolist()
    head = len(p.system) + len(p.previous_text_head)
    return small.tokenizer().decode(tokens[head : tokens.index(p.im_end, head)])


def logits_of(items: list[Loaded], family: str, reach: int = SHAPE.reach) -> np.ndarray:
    """Of one row of these samples."""
    config, params = small.model(3, 2, family)
    shape = dataclasses.replace(SHAPE, reach=reach)
    batch = make_batch([row_of(items, shape)], shape, config.vision, evicts=True)
    mesh = make_mesh()
    attention = choose("xla", Job(config, mesh, "cpu", shape.tokens, shape.samples, jnp.float32, shape.reach, shape.memory))
    recipe = Recipe(attention, Placement(mesh), items[0].sample.unit, "nothing", "nothing")
    stacked = {**params, "text": {**params["text"], "layers": stack(params["text"]["layers"])}}

    @jax.jit
    def logits(params, batch):
        model, x = hidden_states(params, config, batch, recipe)
        return model.text.logits(x)

    return np.asarray(logits(stacked, batch))[0]


def stack(layers):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[key] for key in sorted(layers, key=int)))


def row_of(items: list[Loaded], shape: RowShape = SHAPE) -> OpenRow:
    row = OpenRow(shape)
    for item in items:
        check_fits(item, shape)
        assert row.add(item)
    return row


@pytest.mark.parametrize("family", small.FAMILIES)
def test_a_row_is_a_stream(family, monkeypatch):
    """Two samples in one row; blocks so small that a window spans several of them."""
    monkeypatch.setattr(eviction, "BLOCK", 64)
    items = [loaded(annotation, family) for annotation in CLIPS]
    found, begins = logits_of(items, family), row_of(items).begins
    assert begins[1] % 64 == 0 and begins[1] != len(items[0].sample.tokens)
    for item, annotation, begin in zip(items, CLIPS, begins, strict=True):
        expected = np.concatenate(streamed(monkeypatch, item, annotation, family))
        asked = np.flatnonzero(item.sample.labels >= 0)
        np.testing.assert_allclose(found[begin + asked - 1][:, np.asarray(WATCHED)], expected, atol=5e-5, rtol=0)
    assert np.isfinite(found).all()  # of padding too


def test_what_is_evicted_matters():
    """With a window as long as the row all of it is seen, and what comes of it is something else."""
    whole = dataclasses.replace(SAMPLE, window=ROUNDS + 1, text_sliding=400)
    configs = dataclasses.replace(whole, window=WINDOW), whole
    short, long = (logits_of([loaded(CLIPS[0], "qwen2_5_vl", config)], "qwen2_5_vl", reach=400) for config in configs)
    item = loaded(CLIPS[0], "qwen2_5_vl", whole)
    facts = item.sample.eviction
    assert facts is not None
    early, late = facts.round < WINDOW, facts.round >= WINDOW
    count = len(item.sample.tokens)
    np.testing.assert_allclose(short[:count][early], long[:count][early], atol=1e-5)
    assert np.abs(short[:count][late] - long[:count][late]).max() > 1e-2


def test_operations_are_of_what_is_seen():
    config, _ = small.model(3, 2)
    items = [loaded(annotation, "qwen2_5_vl") for annotation in CLIPS]
    batch = make_batch([row_of(items), OpenRow(SHAPE)], SHAPE, config.vision, evicts=True)
    facts = batch.eviction
    assert facts is not None
    place = np.arange(SHAPE.tokens)
    window = (facts.start[..., None] <= place) & (place <= place[:, None]) & (batch.segments > 0)[..., None]
    words = facts.first[:, None] <= facts.round[..., None]
    words &= (facts.round[..., None] < facts.stop[:, None]) & (facts.source[:, None] <= place[:, None])
    t = config.text
    assert t.head_dim
    pairs = window.sum() + words.sum()
    assert operations(config, batch, set()).attention == 4 * t.num_attention_heads * t.head_dim * t.num_hidden_layers * 3 * pairs


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"memory": 20}, "places of previous text, and a sample has 20"),
        ({"reach": 20}, "attention reaches back 20"),
    ],
)
def test_what_does_not_fit_is_unusable(changes, message):
    with pytest.raises(UnusableRow, match=message):
        check_fits(loaded(CLIPS[0], "qwen2_5_vl"), dataclasses.replace(SHAPE, **changes))


def test_more_words_than_there_is_room_for():
    with pytest.raises(UnusableRow, match="more than the previous text has room for"):
        loaded(CLIPS[0], "qwen2_5_vl", dataclasses.replace(SAMPLE, text_sink=0, text_sliding=2))


@pytest.mark.parametrize("changes", [{"window": 1}, {"layout": "published"}, {"text_sink": None, "text_sliding": None}])
def test_settings_of_a_window(changes):
    with pytest.raises(UserError, match="a window is of 2 rounds or more"):
        dataclasses.replace(SAMPLE, **changes)
