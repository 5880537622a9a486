"""Packed rows: every sample whole, its pixels where the vision tower expects them, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from svlm_jax.config import VisionConfig
from svlm_jax.data.annotations import Annotation, UnusableRow, Word
from svlm_jax.data.batch import IGNORED, PADDING, Batch
from svlm_jax.data.packing import Loaded, OpenRow, Packer, RowShape, make_batch
from svlm_jax.data.patches import grid_order, window_patches
from svlm_jax.data.samples import Sample, SampleConfig, lay_out
from svlm_jax.errors import UserError
from svlm_jax.model.vision import patchify, window_order
from svlm_jax.streaming.prompt import PromptLayout

VISION = VisionConfig(depth=0, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=())
SHAPE = RowShape(tokens=400, bins=3, windows=5)


def loaded(seed: int, seconds: int = 2, size=(56, 84)) -> Loaded:
    """Noise that differs in every pixel from seed to seed, and some words."""
    tokenizer = small.tokenizer()
    words = tuple(Word(i + 0.1, i + 0.5, "red goal"[: 3 + seed % 5]) for i in range(seconds))
    clip = Annotation(f"{seed}.mp4", 0.0, float(seconds), "", "before", words)
    sample = lay_out(clip, SampleConfig(), size, tokenizer, PromptLayout.from_tokenizer(tokenizer), VISION)
    frames = np.random.default_rng(seed).integers(0, 256, (2 * seconds, *size, 3), dtype=np.uint8)
    return Loaded(f"noise:{seed}", sample, window_patches(frames, VISION), size)


@pytest.mark.parametrize("size", [(28, 28), (112, 112), (84, 140), (140, 252)])
def test_patches_are_those_of_the_vision_tower(size):
    frames = np.random.default_rng(0).integers(0, 256, (5, *size, 3), dtype=np.uint8)
    order = window_order(VISION, *size)
    ours = window_patches(frames, VISION)
    theirs = np.asarray(patchify(VISION, np.moveaxis(frames, -1, 1)[None]))[:, order.source].reshape(ours.shape)
    theirs = theirs.reshape(*ours.shape[:-1], 3, -1).swapaxes(-1, -2).reshape(ours.shape)  # colour, frame, y, x
    mean, std = (np.tile(np.array(v, np.float32), 2 * 14 * 14) for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    np.testing.assert_allclose((ours / np.float32(255) - mean) / std, theirs, atol=1e-5)


@pytest.mark.parametrize("size", [(28, 28), (112, 112), (84, 140), (140, 252)])
def test_coordinates_and_tokens_of_a_grid(size):
    order, columns = grid_order(VISION, *size), size[1] // 28
    real = order.valid.reshape(-1)
    at = order.coordinates.reshape(-1, 2)[real]
    assert sorted(map(tuple, at.tolist())) == [(r, c) for r in range(size[0] // 14) for c in range(size[1] // 14)]
    assert (order.coordinates[~order.valid] == 0).all()
    token = np.repeat(order.tokens.reshape(-1), 4)
    assert (token[~real] == -1).all()
    np.testing.assert_array_equal(token[real], at[:, 0] // 2 * columns + at[:, 1] // 2)
    same = order.coordinates // 4 // 2  # all patches of a window are of one window
    assert all(len({tuple(x) for x in block[mask].tolist()}) == 1 for block, mask in zip(same, order.valid, strict=True))


def unpack(batch: Batch, row: int, segment: int, size) -> tuple[np.ndarray, ...]:
    """Tokens, labels, positions and patches of one segment, read by the batch's own words."""
    mask = batch.segments[row] == segment
    rows = np.flatnonzero(mask)
    assert len(rows) == rows[-1] - rows[0] + 1
    order, found = grid_order(VISION, *size), {}
    for g, w in np.ndindex(batch.grids.shape[1:]):
        place = batch.places[row, g, w]
        inside = place[place < batch.tokens.shape[1]]
        if batch.grids[row, g, w] == PADDING:
            assert not len(inside) and not batch.patch_valid[row, g, w].any()
        elif rows[0] <= inside[0] <= rows[-1]:
            key = (g, int(batch.grids[row, g, w]))
            found.setdefault(key, []).append(w)
    clips = []
    for (g, _), windows in found.items():
        assert windows == list(range(windows[0], windows[0] + order.valid.shape[0]))  # one run of windows
        part = slice(windows[0], windows[-1] + 1)
        np.testing.assert_array_equal(batch.patch_coordinates[row, g, part], order.coordinates)
        np.testing.assert_array_equal(batch.patch_valid[row, g, part], order.valid)
        by_token = np.sort(batch.places[row, g, part][order.tokens >= 0])
        np.testing.assert_array_equal(batch.places[row, g, part][order.tokens >= 0], by_token[order.tokens[order.tokens >= 0]])
        assert (batch.places[row, g, part][order.tokens < 0] == batch.tokens.shape[1]).all()
        clips.append((by_token[0], by_token - rows[0], batch.patches[row, g, part]))
    clips.sort(key=lambda clip: clip[0])
    places = np.concatenate([clip[1] for clip in clips])
    return batch.tokens[row][mask], batch.labels[row][mask], batch.positions[row][mask], places, np.stack([clip[2] for clip in clips])


def test_a_row_takes_no_more_samples_than_it_may():
    for samples, taken in ((16, [True] * 3), (2, [True, True, False])):
        row = OpenRow(dataclasses.replace(SHAPE, samples=samples))
        assert [row.add(loaded(seed, 1, (28, 28))) for seed in range(3)] == taken


def test_every_sample_is_whole_in_its_row():
    items = [loaded(0), loaded(1, 1), loaded(2, 2, (28, 56)), loaded(3, 3), loaded(4, 1, (84, 140))]
    packer, rows = Packer(SHAPE, open_rows=2), []
    for item in items:
        closed = packer.add(item)
        rows += [closed] if closed else []
    while (row := packer.flush()) is not None:
        rows.append(row)
    assert sorted(item.name for row in rows for item in row.items) == [item.name for item in items]
    batch = make_batch([*rows, OpenRow(SHAPE)], SHAPE, VISION)
    assert batch.tokens.shape == (len(rows) + 1, 400) and batch.patches.shape[1:] == (3, 5, 64, 1176)
    for index, row in enumerate(rows):
        assert set(batch.segments[index].tolist()) - {PADDING} == set(range(1, len(row.items) + 1))
        for segment, item in enumerate(row.items, start=1):
            tokens, labels, positions, places, patches = unpack(batch, index, segment, item.frame_hw)
            np.testing.assert_array_equal(tokens, item.sample.tokens)
            np.testing.assert_array_equal(labels, item.sample.labels)
            np.testing.assert_array_equal(positions, item.sample.positions)
            np.testing.assert_array_equal(places, item.sample.places)
            np.testing.assert_array_equal(patches, item.patches)
        rest = batch.segments[index] == PADDING
        assert (batch.labels[index][rest] == IGNORED).all() and (batch.tokens[index][rest] == 0).all()
        assert (np.diff(rest.astype(int)) >= 0).all()  # padding is at the end
    assert (batch.segments[-1] == PADDING).all() and not batch.patch_valid[-1].any()
    leaves = jax.tree.leaves(batch)
    assert len(leaves) == len(dataclasses.fields(Batch)) - 1 and {leaf.dtype.name for leaf in leaves} == {"int32", "uint8", "bool"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(30, 400), st.integers(1, 6), st.integers(1, 5)), max_size=25), st.integers(1, 3))
def test_packing_loses_nothing_and_overfills_nothing(sizes, limit):
    packer, rows, kept = Packer(SHAPE, limit), [], []
    for number, (length, grids, windows) in enumerate(sizes):
        row, none = np.zeros(length, np.int32), np.zeros(0, np.int32)
        sample = Sample(row, row, np.zeros((length, 3), np.int32), 1, none, ())
        item = Loaded(str(number), sample, np.zeros((grids, windows, 64, 1), np.uint8), (28, 28))
        try:
            closed = packer.add(item)
        except UnusableRow:
            assert grids > 3 * (5 // windows)
            continue
        kept.append(item.name)
        rows += [closed] if closed else []
        assert len(packer.rows) <= limit
    while (row := packer.flush()) is not None:
        rows.append(row)
    assert sorted(kept) == sorted(item.name for row in rows for item in row.items)
    for row in rows:
        assert row.items and sum(len(item.sample.tokens) for item in row.items) == row.tokens <= 400
        filled = [0] * 3
        for item, bins in zip(row.items, row.bins, strict=True):
            for target in bins:
                filled[target] += item.windows
        assert max(filled) <= 5 and [5 - n for n in filled] == row.free
        assert [int(item.name) for item in row.items] == sorted(int(item.name) for item in row.items)


@pytest.mark.parametrize(
    "shape, reason",
    [
        (RowShape(50, 8, 5), "longer than a row"),
        (RowShape(400, 8, 1), "frames larger than a bin"),
        (RowShape(400, 1, 3), "more video than a row"),
    ],
)
def test_a_sample_that_fits_no_row_says_why(shape, reason):
    with pytest.raises(UnusableRow) as error:
        Packer(shape).add(loaded(0, 3, (84, 140)))
    assert error.value.reason == reason


def test_shapes_that_cannot_be():
    with pytest.raises(UserError, match="at least 1"):
        RowShape(0)
    with pytest.raises(UserError, match="open_rows"):
        Packer(SHAPE, 0)
