"""Contestants at work: a checkpoint on many videos as one batch, killed and gone on with; a server that takes pictures; all of `svlm eval`."""

import argparse
import base64
import dataclasses
import io
import json
from pathlib import Path

import av
import jax
import numpy as np
import pytest
import small
from judge_server import Server
from PIL import Image

from svlm_jax import cli
from svlm_jax.checkpoints.load import LoadedModel
from svlm_jax.checkpoints.stream_settings import write_stream_settings
from svlm_jax.commands.eval_flags import add_sides
from svlm_jax.config import StreamConfig
from svlm_jax.data.video import read_rounds
from svlm_jax.errors import UserError
from svlm_jax.evaluation import watching
from svlm_jax.evaluation.compare import run_config, sides
from svlm_jax.evaluation.contestants import PUBLISHED
from svlm_jax.evaluation.inf_streams import Piece, merge, read_games, shard
from svlm_jax.evaluation.journal import Journal
from svlm_jax.evaluation.watch import Watch
from svlm_jax.evaluation.watching import Watching
from svlm_jax.streaming.prompt import encode_query, encode_words
from svlm_jax.streaming.snapshot import load_engine, read_note, save_engine

DATA = Path(__file__).parent / "data" / "evaluation"
GAMES, EVENTS = DATA / "inf_streams.jsonl", DATA / "livesports.json"
CONFIG = StreamConfig(
    vision_window=3,
    text_window=3,
    text_sink=12,
    text_sliding=12,
    max_new_tokens=4,
    max_pixels=3136,
    query="Go",
    question_capacity=0,
    seed=3,
)
FLAGS = (
    "--vision-window",
    3,
    "--text-window",
    3,
    "--text-sink",
    12,
    "--text-sliding",
    12,
    "--max-new-tokens",
    4,
    "--max-pixels",
    3136,
    "--seed",
    3,
)
SHORT = ("--start", 4, "--segment", 10, "--min-words", 15)


def clip(path: Path, seconds: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=4)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 56, 56, "yuv420p", 8
        for number in range(round(seconds * 4)):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(picture, 3 * number, 1), format="rgb24")))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The miniature's videos; the last game's ends two seconds before its reference does."""
    folder = tmp_path_factory.mktemp("videos")
    for number, game in enumerate(read_games(GAMES)):
        clip(folder / game.video, game.end - 2 * (number == 2), number)
    clip(folder / "LEx0aaaaaa1.mp4", 15, 5)
    clip(folder / "LEx0bbbbbb2.mp4", 8, 6)
    return folder


@pytest.fixture(scope="module")
def model():
    config, params = small.model(1, 0)
    return LoadedModel(config, params, small.tokenizer(), Path("small"))


def watches(videos) -> list[Watch]:
    """Two whole games, one in three chunks, and one that lasts for less than is asked for."""
    a, b, c = read_games(GAMES)
    made = [Watch(g.name, str(videos / g.video), 4.0, end, g.before(4.0)) for g, end in ((a, 13.0), (c, 16.0))]
    made += [Watch(b.name, str(videos / b.video), s, s + 4.0, b.before(s)) for s in (4.0, 8.0, 12.0)]
    return [*made, Watch("LEx0bbbbbb2.mp4", str(videos / "LEx0bbbbbb2.mp4"), 1.07, 4.4, "", "Go on")]


def start(model, made, folder: Path, **how) -> tuple[Journal, Watching]:
    journal = Journal(folder / "results.jsonl")
    record = how.pop("record", lambda r: shard(r.watch.name, r.start, r.end, r.items))
    return journal, Watching(model, made, how.pop("config", CONFIG), journal, record, **{"streams": 2, "every": 4, **how})


def finish(model, made, folder: Path, **how) -> bytes:
    journal, work = start(model, made, folder, **how)
    if len(made) > 5:  # as if the last ones had frames of another size: a batch of their own, which would be other programs
        work.groups = [((56, 56), [0, 1, 2]), ((56, 56), [3, 4, 5])]
    with journal:
        work.run()
    return (folder / "results.jsonl").read_bytes()


class Killed(BaseException):
    pass


def test_killed_at_every_step(model, videos, tmp_path, monkeypatch):
    """A kill before, in the middle of and after each append, and before each saving: the results are the same bytes."""
    made = watches(videos)
    (tmp_path / "whole").mkdir()
    whole = finish(model, made, tmp_path / "whole")
    results = merge(("row", json.loads(line)) for line in whole.splitlines())
    assert [(r.start, r.end, len(r.items)) for r in results.values()] == [(1.07, 4.4, 4), (4, 13, 9), (4, 16, 12), (4, 14, 10)]
    for result in results.values():  # every round once, in order, without a gap
        assert [item.start for item in result.items[1:]] == [item.end for item in result.items[:-1]]

    steps = iter(())
    append, save = Journal.append, watching.save_engine

    def killed_append(self, *rows):
        step = next(steps, "go on")
        if step == "before":
            raise Killed
        if step == "torn":
            data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            with open(self.path, "ab") as file:
                file.write(data[: len(data) * 2 // 3])
            raise Killed
        append(self, *rows)
        if step == "after":
            raise Killed

    def killed_save(engine, path, note):
        if next(steps, "go on") == "unsaved":
            raise Killed
        save(engine, path, note)

    loads, load = [], watching.load_engine
    monkeypatch.setattr(watching, "load_engine", lambda engine, path: loads.append(load(engine, path)))
    monkeypatch.setattr(Journal, "append", killed_append)
    monkeypatch.setattr(watching, "save_engine", killed_save)
    folder, kills = tmp_path / "killed", 0
    folder.mkdir()
    for plan in (
        ["torn"],
        ["go on", "go on", "before"],
        ["go on", "unsaved"],
        ["after"],
        ["go on", "go on", "torn"],
        ["go on"] * 5 + ["after"],
    ):
        steps = iter(plan)
        with pytest.raises(Killed):
            finish(model, made, folder)
        kills += 1
    steps = iter(())
    assert finish(model, made, folder) == whole and kills == 6
    assert len(loads) == 5  # all but the first two starts; the last one with no row open
    assert finish(model, made, folder) == whole  # a run that is done does nothing
    with pytest.raises(UserError, match="of a run over 6 stretches"):
        finish(model, made[:2], folder)


def test_the_same_as_an_engine_fed_by_hand(model, videos, tmp_path):
    """A row of the batch says what its video's frames, times, words and query make an engine say, in any row."""
    game = read_games(GAMES)[0]
    watch = Watch(game.name, str(videos / game.video), 8.0, 14.0, game.before(8.0))
    journal, work = start(model, [watch], tmp_path)
    with journal:
        work.run()
        said = [(i["start_time"], i["end_time"], i["response"]) for row in journal.rows for i in row["items"]]
    words = encode_words(model.tokenizer, watch.previous)
    assert work.words(watch) == [*words[:12], *words[-11:]] and len(words) > 23
    engine = work._engine((56, 56), [0])
    engine.open(1, words=[*words[:12], *words[-11:]], query="Go", seed=3)
    expected = []
    for video in read_rounds(watch.video, fps=2, chunk_seconds=1, start=8, duration=6, max_pixels=3136):
        frames = np.stack([np.zeros_like(video.frames), video.frames]).transpose(0, 1, 4, 2, 3)
        tokens = engine.step(frames, {1: (video.start, video.end)}).tokens()[1]
        expected.append((video.start, video.end, engine.spoken(tokens)))
    assert said == expected and len(said) == 6 and len({text for _, _, text in said}) > 3


def test_queries_of_their_own(model, videos):
    """The first round has each stream's query, and no other round has any."""
    journal, work = start(model, watches(videos)[:1], videos)
    journal.close()
    engine = work._engine((56, 56), [0])
    for row, text in enumerate(("Go", "Go on")):
        engine.open(row, words=(), query=text)
    prompt = engine.prompt({0: (0.0, 1.0), 1: (0.0, 1.0)})
    asked = [prompt.query[row, : prompt.query_length[row]].tolist() for row in range(2)]
    assert asked == [list(encode_query(model.tokenizer, text)) for text in ("Go", "Go on")]
    engine._rows[0].age = 1
    assert engine.prompt({0: (0.0, 1.0), 1: (0.0, 1.0)}).query_length.tolist() == [0, len(asked[1])]
    engine._rows[1].age = 1
    assert engine.prompt({0: (0.0, 1.0), 1: (0.0, 1.0)}).query is None
    with pytest.raises(UserError, match="the query of stream 0 has"):
        engine.open(0, query="Go on and on " * 40)


def test_whole_records_alone(model, videos, tmp_path):
    """Without `partial`, a stretch has one row, at its end, also after a kill in its middle."""
    made = watches(videos)[:3]
    (tmp_path / "whole").mkdir()
    rows = [json.loads(line) for line in finish(model, made, tmp_path / "whole", partial=False).splitlines()]
    assert sorted((row["video"][0], row["chunk_start"], len(row["items"])) for row in rows) == [("a", 4, 9), ("b", 4, 4), ("c", 4, 10)]
    journal, work = start(model, made, tmp_path, partial=False)
    count = []

    def told(done, total):
        count.append(done)
        if done >= 13:
            raise Killed

    work.told = told
    with journal, pytest.raises(Killed):
        work.run()
    assert count[-1] == 14 and finish(model, made, tmp_path, partial=False) == (tmp_path / "whole" / "results.jsonl").read_bytes()


def test_what_the_host_remembers_is_saved(model, videos, tmp_path):
    """Rows, keys and every array of the state."""
    journal, work = start(model, watches(videos)[:1], tmp_path)
    journal.close()
    saved, loaded = (work._engine((56, 56), [0]) for _ in range(2))
    saved.open(1, words=(5, 6, 7), query="Go", seed=11)
    saved._rows[1].recent.extend([2, 3])
    saved._rows[1].memory += [8]
    save_engine(saved, tmp_path / "engine.npz", {"any": "note"})
    load_engine(loaded, tmp_path / "engine.npz")
    assert read_note(tmp_path / "engine.npz") == {"any": "note"} and loaded._rows == saved._rows and loaded._rows[1].memory == [5, 6, 7, 8]
    assert (jax.random.key_data(loaded._key) == jax.random.key_data(saved._key)).all()
    for before, after in zip(jax.tree.leaves(saved.state), jax.tree.leaves(loaded.state), strict=True):
        assert before.dtype == after.dtype and (np.asarray(before) == np.asarray(after)).all()
    small_engine = work._engine((28, 56), [0])
    with pytest.raises(UserError, match="is of other settings or another model"):
        load_engine(small_engine, tmp_path / "engine.npz")
    (tmp_path / "engine.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is no snapshot"):
        read_note(tmp_path / "engine.npz")


def test_windows(model, videos, tmp_path):
    """A mode whose words are carried by the host goes on after a kill as well."""
    config = dataclasses.replace(CONFIG, mode="windows")
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    made = watches(videos)[2:5]
    whole = finish(model, made, folders[0], config=config)
    journal, work = start(model, made, folders[1], config=config)

    def told(done, total):
        if done == 10:
            raise Killed

    work.told = told
    with journal, pytest.raises(Killed):
        work.run()
    assert finish(model, made, folders[1], config=config) == whole


def images(body) -> list[Image.Image]:
    parts = body["messages"][1]["content"]
    return [Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].partition(",")[2]))) for p in parts if p["type"] == "image_url"]


def test_a_server_as_contestant(videos, tmp_path):
    """What it is shown, fair and as published; its own history; and a run that breaks off asks for nothing twice."""
    broken = [True]

    def fault(body, attempt):
        return "500" if broken[0] and len(server.requests) > 4 else None

    def texts(body):
        return body["messages"][1]["content"][0]["text"]

    games = read_games(GAMES)
    with Server(answer=lambda body: f"Said at {texts(body).split('from ')[1].split(' s')[0]}", fault=fault).serving() as server:

        def run(out, *argv, code=0):
            command = [
                "eval",
                "inf-streams",
                GAMES,
                "--videos",
                videos,
                *SHORT,
                *FLAGS,
                "--a",
                f"them={server.url}#gpt",
                "--out",
                out,
                *argv,
            ]
            assert cli.run([str(word) for word in (*command, "--wait", 0.01, "--tries", 2)]) == code

        run(tmp_path / "fair", "--workers", 1, code=1)
        broken[0] = False
        asked = len(server.requests)
        run(tmp_path / "fair", "--workers", 1)
        fair = [body for body in server.requests[:4] + server.requests[asked:]]
        assert (
            len(fair) == 4 + 3 + 1 and len({texts(body) for body in fair}) == 8
        )  # windows of 10 s from 4 s on; the last one has no frames
        first, second = fair[:2]
        assert len(images(first)) == 20 and images(first)[0].size == (56, 56)  # 2 a second
        assert f"What was said before: {games[0].before(4.0)[:20]}" in texts(first) and texts(second).endswith("Said at 4.0")
        rows = (tmp_path / "fair" / "a" / "merged_result.jsonl").read_text().splitlines()
        first = json.loads(rows[0])
        assert (first["chunk_start"], first["chunk_end"]) == (4, 40)
        assert [i["response"] for i in first["items"]] == [f"Said at {t}.0" for t in (4, 14, 24, 34)]

        del server.requests[:]
        run(tmp_path / "published", "--setting", "published")
        assert {len(images(body)) for body in server.requests} == {2, 3} and not any("before" in texts(body) for body in server.requests)
        del server.requests[:]
        run(tmp_path / "chunks", "--chunk-seconds", 25)
        by_start = {texts(body).split("from ")[1].split(" s")[0]: texts(body) for body in server.requests}
        assert by_start.keys() == {"4.0", "29.0"} and "the lead is six" not in by_start["4.0"]
        assert "What was said before" in by_start["29.0"] and "Said at" not in by_start["29.0"]  # the reference's words


def test_a_checkpoint_from_end_to_end(videos, tmp_path, monkeypatch):
    """Generate, merge, judge, report, with the bundled model; a second start does nothing anew."""
    monkeypatch.setattr("svlm_jax.api.load", lambda path, dtype, mesh=None: LoadedModel(*small.model(1, 0), small.tokenizer(), Path("small")))
    with Server().serving() as server:
        command = [
            "eval",
            "inf-streams",
            GAMES,
            "--videos",
            videos,
            *SHORT,
            *FLAGS,
            "--streams",
            2,
            "--save-every",
            9,
            "--out",
            tmp_path / "run",
        ]
        command += ["--a", "demo", "--b", f"them={server.url}#gpt", "--judge", server.judge]
        server.answer = lambda body: "A" if body["model"] == "judge-1" else "A plain sentence."
        assert cli.run([str(word) for word in command]) == 0
        report, asked = (tmp_path / "run" / "report.json").read_bytes(), len(server.requests)
        assert cli.run([str(word) for word in command]) == 0
        assert (tmp_path / "run" / "report.json").read_bytes() == report and len(server.requests) == asked
    found = json.loads(report)
    assert found["coverage"]["a"] == {"games": 3, "of_games": 3, "ended_early": ["cR5mJq8-eUo.mp4"], "segments": 7, "refused": 0}
    assert found["votes"]["total"]["ties"] == 7 and found["votes"]["total"]["first_shown"] == 1.0
    assert found["measures"]["a"]["seconds"] == 36 + 30 + 10 and 0 < found["measures"]["a"]["words_a_second"] <= 4
    assert cli.run([*map(str, command), "--temperature", "0.5"]) == 1  # other settings do not mix in one folder


def test_a_checkpoint_is_run_by_its_own_settings(tmp_path):
    """What the flags do not say is as `streaming.json` has it, for the checkpoint and for the server that is shown its frames."""
    write_stream_settings(tmp_path, {"fps": 4, "text_sink": 64, "temperature": 0})
    parser = argparse.ArgumentParser()
    add_sides(parser)
    for flags, fps in (([], 4), (["--fps", "1"], 1)):
        args = parser.parse_args(["--a", str(tmp_path), "--b", "http://localhost/v1#gpt", *flags])
        given = sides(args)
        for who in given.values():
            config = run_config(args, given, who)
            assert (config.fps, config.text_sink, config.temperature) == (fps, 64, 0)
            assert config.max_pixels == StreamConfig().max_pixels
    alone = parser.parse_args(["--a", "demo"])
    assert run_config(alone, sides(alone), sides(alone)["a"]) == StreamConfig()
    published = run_config(args, given, given["a"], PUBLISHED)
    assert (published.fps, published.text_sink, published.temperature) == (1, 512, 0.9)  # not the checkpoint's own, where it is published
    (tmp_path / "streaming.json").write_text('{"fpz": 4}')
    with pytest.raises(UserError, match="there is no setting fpz"):
        run_config(args, given, given["a"])
    args = parser.parse_args(["--a", "no/such", "--dry-run"])
    assert run_config(args, sides(args), sides(args)["a"]) == StreamConfig()  # an estimate needs no checkpoint


def test_livesports_from_end_to_end(videos, tmp_path, monkeypatch):
    """A checkpoint against a server that refuses one event: rows in the published form, two votes an event."""
    monkeypatch.setattr("svlm_jax.api.load", lambda path, dtype, mesh=None: LoadedModel(*small.model(1, 0), small.tokenizer(), Path("small")))

    def answer(body):
        return "A" if body["model"] == "judge-1" else "Harrow has it."

    command = ["eval", "livesports", EVENTS, "--videos", videos, *FLAGS, "--streams", 2, "--out", tmp_path / "run", "--query", "Go"]
    with Server(answer=answer, refuse=lambda body: "bridge" in json.dumps(body) and body["model"] == "gpt").serving() as server:
        command += ["--a", "demo", "--b", f"them={server.url}#gpt", "--judge", server.judge]
        for _ in range(2):
            assert cli.run([str(word) for word in command]) == 0
        asked = [body for body in server.requests if body["model"] == "gpt"]
        assert len(asked) == 3 and len(server.requests) == 3 + 6
        first = next(body for body in asked if "wicket in one over" in body["messages"][1]["content"][0]["text"])
        text = first["messages"][1]["content"][0]["text"]
        assert (
            text.startswith("Go: A boundary and a wicket in one over")
            and "What was said before: Mbeki comes" in text
            and len(images(first)) == 12
        )
    rows = [[json.loads(line) for line in (tmp_path / "run" / side / "predictions.jsonl").read_text().splitlines()] for side in "ab"]
    events = [("LEx0aaaaaa1", 3, 2.5, 8.25), ("LEx0aaaaaa1", 5, 9.0, 14.0), ("LEx0bbbbbb2", 1, 1.07, 6.4)]
    assert all([(r["video_id"], r["event_id"], r["begin"], r["end"]) for r in side] == events for side in rows)
    assert all(row["pred"] for row in rows[0]) and [row["pred"] for row in rows[1]] == ["Harrow has it.", "Harrow has it.", ""]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["coverage"]["b"] == {"events": 3, "refused": 1} and report["votes"]["total"]["ties"] == 3


def test_a_missing_video_is_told_before_any_work(model, videos, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        start(model, [*watches(videos), Watch("x", str(videos / "x.mp4"), 0.0, 5.0)], tmp_path)
    assert not list(tmp_path.glob("engine*"))


def test_items_are_pieces():
    assert merge([("row", shard("x.mp4", 1.0, 2.5, [Piece(1.0, 2.0, "hello ...")]))])["x.mp4"].items == (Piece(1.0, 2.0, "hello"),)
