"""The pipeline: one order whatever the hosts, threads and processes; exact resumption; rows that cannot be used are counted."""

import collections
import dataclasses
import itertools
import json
import logging
import os
import tempfile

import jax
import numpy as np
import pytest
import small

from svlm_jax.config import VisionConfig
from svlm_jax.data import parcel
from svlm_jax.data.annotations import parse_annotation
from svlm_jax.data.loader import FrameCache, LoaderConfig, Rejected, SampleLoader, Source, read_clip
from svlm_jax.data.packing import RowShape
from svlm_jax.data.pipeline import DataConfig, DatasetConfig, Workers, make_batches, merge_states, sample_order
from svlm_jax.data.samples import SampleConfig
from svlm_jax.demo.clip import sample_path
from svlm_jax.errors import UserError

VISION = VisionConfig(depth=0, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=())
LOADER = LoaderConfig(SampleConfig(), max_pixels=28 * 56)
SHAPE = RowShape(tokens=300, bins=3, windows=4)
INLINE = Workers(threads=0, batches_ahead=0)


CLIP = str(sample_path())


def row(video=CLIP, start=0.0, end=2.0, text="red"):
    clip = {"type": "video", "video": video, "video_start": start, "video_end": end}
    said = [[start, start + 0.5, text], [start + 1, end, "goal"]]
    return [
        {"role": "user", "content": [clip, {"type": "text", "text": "", "previous": ""}]},
        {"role": "assistant", "content": [{"type": "text_stream", "text_stream": said}]},
    ]


def write(path, rows) -> DatasetConfig:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return DatasetConfig(str(path))


@pytest.fixture
def config(tmp_path):
    """24 clips of one to four seconds, two of them doubled, in two files."""
    rows = [row(start=float(i % 7), end=float(i % 7 + 1 + i % 4), text=f"w{i}") for i in range(24)]
    datasets = {"a": write(tmp_path / "a.jsonl", rows[:14]), "b": write(tmp_path / "b.jsonl", [*rows[14:], rows[14], rows[15]])}
    return DataConfig(datasets, LOADER, SHAPE, rows=4, lanes=4, seed=3)


def batches(config, workers=INLINE, **kwargs):
    return make_batches(config, small.tokenizer(), VISION, workers=workers, **kwargs)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(ours, theirs):
    assert ours.samples == theirs.samples
    jax.tree.map(np.testing.assert_array_equal, ours.batch, theirs.batch)


def names(rows):
    return [name for row in rows.samples for name in row]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_order(config, hosts):
    """Each batch is the hosts' parts put behind one another, arrays and all."""
    alone = take(iter(batches(config)), 6)
    parts = [take(iter(batches(config, shard=(host, hosts))), 6) for host in range(hosts)]
    for step, whole in enumerate(alone):
        assert tuple(itertools.chain(*(part[step].samples for part in parts))) == whole.samples
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(part[step].batch for part in parts))
        jax.tree.map(np.testing.assert_array_equal, joined, whole.batch)
        assert whole.batch.tokens.shape == (4, 300)
        assert sum((collections.Counter(part[step].skipped) for part in parts), collections.Counter()) == whole.skipped


def test_threads_and_batches_ahead_change_nothing(config):
    iterator = iter(batches(config, Workers(threads=2, ahead=2, batches_ahead=2)))
    for ours, theirs in zip(take(iterator, 6), take(iter(batches(config)), 6), strict=True):
        same(ours, theirs)
    iterator.close()


def test_worker_processes_change_nothing(config):
    iterator = iter(batches(config, Workers(processes=2, threads=1, ahead=1, batches_ahead=0), shard=(1, 4)))
    for ours, theirs in zip(take(iterator, 4), take(iter(batches(config, shard=(1, 4))), 4), strict=True):
        same(ours, theirs)
    iterator.close()


def test_closing_leaves_nothing_that_worker_processes_wrote(config):
    iterator = iter(batches(config, Workers(processes=1, threads=1, ahead=2, batches_ahead=1), shard=(1, 4)))
    next(iterator)
    names = [name for folder in (parcel.MEMORY, tempfile.gettempdir()) if os.path.isdir(folder) for name in os.listdir(folder)]
    assert any(name.startswith(f"svlm-{os.getpid()}-") for name in names)  # what is ahead
    iterator.close()
    names = [name for folder in (parcel.MEMORY, tempfile.gettempdir()) if os.path.isdir(folder) for name in os.listdir(folder)]
    assert not any(name.startswith(f"svlm-{os.getpid()}-") for name in names)


@pytest.mark.parametrize("full", [False, True])
def test_a_parcel_is_read_part_by_part_and_goes_elsewhere_where_memory_is_full(monkeypatch, full):
    open_privately = parcel._private

    def no_room(path, flags):
        made = open_privately(path, flags)
        if os.path.dirname(path) != parcel.MEMORY:
            return made
        os.close(made)
        return os.open("/dev/full", os.O_WRONLY)

    if full:
        monkeypatch.setattr(parcel, "_private", no_room)
    post, array = parcel.Post(), np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    sent = post.pack(array)
    assert sent.shape == (4, 3, 2) and len(sent) == 4
    if full:
        assert os.path.dirname(sent.path) == tempfile.gettempdir()
        assert not os.path.exists(os.path.join(parcel.MEMORY, os.path.basename(sent.path)))
    whole = np.zeros((5, 3, 2), np.uint8)
    sent.read([whole[1:2], whole[2:5]])
    np.testing.assert_array_equal(whole[1:], array)
    with pytest.raises(EOFError, match="is shorter than what was written"):
        sent.read([whole])
    sent.drop()
    assert not os.path.exists(sent.path)
    unread = post.pack(array)
    post.clear()
    assert not os.path.exists(unread.path)


@pytest.mark.parametrize("workers", [INLINE, Workers(threads=1, ahead=2, batches_ahead=2)], ids=["inline", "ahead"])
def test_resumes_exactly_where_it_was_saved(config, workers):
    iterator = iter(batches(config, workers))
    seen, states = [], [iterator.get_state()]
    for _ in range(8):
        seen.append(next(iterator))
        states.append(iterator.get_state())
    iterator.set_state(states[5])  # one that is running can be set back as well
    for rest in seen[5:]:
        same(next(iterator), rest)
    iterator.close()
    assert any(len(lane["open"]) > 1 or len(lane["open"][0]) > 1 for lane in states[3]["lanes"].values())  # it is the packing's state, too
    for at in (0, 3):
        again = iter(batches(config, workers))
        again.set_state(json.loads(json.dumps(states[at])))
        for rest in seen[at:]:
            ours = next(again)
            same(ours, rest)
            assert ours.skipped == rest.skipped
        assert again.get_state() == states[-1]
        again.close()


def test_resumes_on_another_number_of_hosts(config):
    seen = take(iter(batches(config)), 6)
    two = [iter(batches(config, shard=(host, 2))) for host in range(2)]
    for iterator in two:
        take(iterator, 3)
    state = merge_states([iterator.get_state() for iterator in two])
    for hosts in (1, 4):
        parts = [iter(batches(config, shard=(host, hosts))) for host in range(hosts)]
        for iterator in parts:
            iterator.set_state(state)
        for whole in seen[3:]:
            assert tuple(itertools.chain(*(next(iterator).samples for iterator in parts))) == whole.samples
    with pytest.raises(UserError, match=r"lacks lanes 2, 3.*merge_states"):
        iter(batches(config)).set_state(two[0].get_state())


def test_a_state_of_other_data_is_refused(config, tmp_path):
    state = iter(batches(config)).get_state()
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    (tmp_path / "moved.jsonl").write_text("".join(line + "\n" for line in lines))
    changes = (
        {"datasets": {**config.datasets, "b": write(tmp_path / "swapped.jsonl", lines[::-1])}},
        {"datasets": dict(reversed(config.datasets.items()))},
        {"loader": dataclasses.replace(LOADER, sample=SampleConfig("streaming"))},
        {"shape": RowShape(301, 3, 4)},
        {"seed": 4},
        {"open_rows": 1},
    )
    for change in changes:
        with pytest.raises(UserError, match="the order would change"):
            iter(batches(dataclasses.replace(config, **change))).set_state(state)
    moved = {**config.datasets, "b": DatasetConfig(str(tmp_path / "moved.jsonl"))}
    harmless = dataclasses.replace(config, datasets=moved, loader=dataclasses.replace(LOADER, cache_bytes=0))
    iter(batches(harmless)).set_state(state)


def test_every_row_once_an_epoch_and_the_rest_is_padding(config):
    once = DataConfig(config.datasets, LOADER, SHAPE, rows=4, lanes=4, epochs=1)
    seen = list(iter(batches(once)))
    expected = [f"a:{i}" for i in range(14)] + [f"b:{i}" for i in range(10)]
    assert sorted(itertools.chain(*map(names, seen))) == sorted(expected)
    assert seen[-1].skipped == {"b: doubled": 2}
    twice = list(iter(batches(DataConfig(config.datasets, LOADER, SHAPE, rows=4, lanes=4, epochs=2))))
    assert collections.Counter(itertools.chain(*map(names, twice))) == dict.fromkeys(expected, 2)


def test_hosts_that_run_dry_go_on_with_padding(config):
    once = dataclasses.replace(config, rows=2, lanes=2, epochs=1, open_rows=1)
    hosts = [iter(batches(once, shard=(host, 2), go_on=True)) for host in range(2)]
    alone = [list(iter(batches(once, shard=(host, 2)))) for host in range(2)]
    steps = max(map(len, alone)) + 1
    for host, own in zip(hosts, alone, strict=True):
        given = take(host, steps)
        assert [rows.samples for rows in given[: len(own)]] == [rows.samples for rows in own]
        for rows in given[len(own) :]:
            assert rows.samples == ((),) and not rows.batch.segments.any() and rows.batch.tokens.shape == (1, 300)


def test_a_mixture_keeps_its_weights(config):
    datasets = {"a": DatasetConfig(config.datasets["a"].path, weight=3), "b": DatasetConfig(config.datasets["b"].path, weight=1)}
    mixed = DataConfig(datasets, LOADER, SHAPE)
    order = sample_order(mixed, {"a": 14, "b": 12})
    first = [order[i] for i in range(160)]
    assert collections.Counter(name for name, _ in first) == {"a": 120, "b": 40}
    for name, length in (("a", 14), ("b", 12)):
        rows = [row for key, row in first if key == name]
        assert all(sorted(rows[i : i + length]) == list(range(length)) for i in range(0, 36 - length, length))  # whole epochs of each
        assert rows[:length] != rows[length : 2 * length]
    assert first == [sample_order(mixed, {"a": 14, "b": 12})[i] for i in range(160)]


def test_unusable_rows_are_counted_by_reason_and_told_once(tmp_path, caplog):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video" * 100)
    bad = {
        "broken JSON": "[{",
        "not a streaming row": [{"role": "user"}],
        "impossible times": row(start=3.0, end=2.0),
        "video missing": row("absent.mp4"),
        "video empty": row("empty.mp4"),
        "video unreadable": row("text.mp4"),
        "video ends early": row(start=9.0, end=14.0),
        "clip too long": row(end=70.0),
        "too short": row(end=0.2),
        "longer than a row": row(end=12.0),
    }
    doubled = [row(start=1.0), row(start=1.0)]
    dataset = DatasetConfig(write(tmp_path / "a.jsonl", [row(), *bad.values(), row("absent.mp4", end=1.0), *doubled]).path, str(tmp_path))
    config = DataConfig({"bad": dataset}, LOADER, RowShape(200, 12, 4), rows=1, lanes=1, epochs=1, shuffle=False)
    with caplog.at_level(logging.WARNING):
        last = list(iter(batches(config)))[-1]
    assert last.skipped == {f"bad: {reason}": 1 + (reason == "video missing") for reason in [*bad, "doubled"]}
    assert len(caplog.records) == len(bad) + 1 and "absent.mp4" in caplog.text


def test_data_that_are_wrong_as_a_whole_end_the_run(tmp_path):
    config = DataConfig({"bad": write(tmp_path / "a.jsonl", [row("absent.mp4")])}, LOADER, SHAPE, rows=1, lanes=1)
    with pytest.raises(UserError, match=r"^20 rows in a row cannot be used.*absent.mp4.*settings of the data$"):
        next(iter(batches(config)))
    with pytest.raises(UserError, match=r"^20 rows"):
        next(iter(batches(config, Workers(threads=1))))


# Decoding


def test_frames_are_cached_within_a_limit(monkeypatch):
    from svlm_jax.data import loader

    calls = []
    read = loader.read_rounds
    monkeypatch.setattr(loader, "read_rounds", lambda *args, **kwargs: calls.append(kwargs) or read(*args, **kwargs))
    clip = parse_annotation(json.dumps(row(start=1.0, end=5.0)))
    cache = FrameCache(1 << 20)
    first = read_clip(clip.video, clip, LOADER, cache)
    again = read_clip(clip.video, clip, LOADER, cache)
    assert len(calls) == 1 and all(a is b for a, b in zip(first, again, strict=True))
    later = parse_annotation(json.dumps(row(start=3.0, end=7.0)))
    overlapping = read_clip(clip.video, later, LOADER, cache)
    assert calls[1]["start"] == 5.0 and calls[1]["duration"] == 2.0
    assert overlapping[0] is first[2]
    for cached, fresh in zip(overlapping, read_clip(clip.video, later, LOADER, FrameCache(0)), strict=True):
        np.testing.assert_array_equal(cached, fresh)
    tight = FrameCache(first[0].nbytes)
    read_clip(clip.video, clip, LOADER, tight)
    assert tight.size == first[0].nbytes and tight.get((clip.video, LOADER.max_pixels, 2.0, 4000)) is not None


@pytest.mark.parametrize("layout, frames", [("published", 14), ("streaming", 16)])
def test_the_last_turn_of_a_clip_may_be_short(layout, frames):
    """At 8 fps a clip of 1.75 s has 14 frames; the engine's rounds are all of a size, the last frame is shown on."""
    config = LoaderConfig(SampleConfig(layout, fps=8.0), max_pixels=28 * 56)
    source = Source([json.dumps(row(end=1.75)).encode()])
    loaded = SampleLoader({"a": source}, config, small.tokenizer(), VISION)(("a", 0))
    assert not isinstance(loaded, Rejected)
    assert len(loaded.patches) == frames // 2 == sum(grid[0] for grid in loaded.sample.grids)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"datasets": {}}, "no data set"),
        ({"datasets": {"a": DatasetConfig("a"), "b": DatasetConfig("b", weight=1.0)}}, "to each of them or to none"),
        ({"datasets": {"a": DatasetConfig("a", weight=0.0)}}, "must be positive"),
        ({"datasets": {"a": DatasetConfig("a", weight=1.0)}, "epochs": 1}, "has no epochs"),
        ({"datasets": {"a": DatasetConfig("a")}, "rows": 4, "lanes": 3}, "must divide rows"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**changes)


def test_lanes_that_the_hosts_cannot_share_say_so(config):
    with pytest.raises(UserError, match="4 lanes cannot be shared by 3 hosts"):
        batches(config, shard=(0, 3))
