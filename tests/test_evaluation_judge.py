"""`svlm eval` without a model of ours: result files merged, judged over real HTTP, reported; kills and failures change nothing."""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import Server, by_marks, shown

from svlm_jax import cli
from svlm_jax.errors import UserError
from svlm_jax.evaluation import cost
from svlm_jax.evaluation.contestants import parse_contestant
from svlm_jax.evaluation.endpoint import Reply
from svlm_jax.evaluation.inf_streams import Game, Piece, Result, cut_segments, merge, merged_bytes, read_games, read_results, said_in
from svlm_jax.evaluation.inf_streams_run import _watches as watches
from svlm_jax.evaluation.intervals import bootstrap, wilson
from svlm_jax.evaluation.journal import Journal, run_folder
from svlm_jax.evaluation.judge import LONGEST, read_verdict
from svlm_jax.evaluation.livesports import read_events
from svlm_jax.evaluation.measures import measure, names

DATA = Path(__file__).parent / "data" / "evaluation"
GAMES, EVENTS = DATA / "inf_streams.jsonl", DATA / "livesports.json"
SHORT = ("--start", 4, "--segment", 10, "--min-words", 15)
QUICK = ("--wait", 0.01, "--timeout", 0.4)
# what is said in the seven segments of the miniature: three of the first game, three of the second, one of the third
MARKS = ("strong", "even", "weak", "strong", "strong", "even", "weak")
PLAIN = ("plain",) * 7


def segments():
    return cut_segments(read_games(GAMES), 4.0, 10.0, 15)


def results(path: Path, marks=PLAIN, seconds: int = 5) -> Path:
    """A result file that says each segment's mark and its number, in items of some seconds."""
    rows = []
    for game in read_games(GAMES):
        said = {s.start: f"{mark} {i}" for i, (s, mark) in enumerate(zip(segments(), marks, strict=True)) if s.video == game.name}
        items = []
        for start in range(4, game.end, seconds):
            at = max((s for s in said if s <= start < s + 10), default=None)
            items.append(
                {"response": said.get(at, "") if at == start else "", "start_time": start, "end_time": min(start + seconds, game.end)}
            )
        rows.append({"video": game.name, "chunk_start": 4, "chunk_end": game.end, "items": items})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return results(tmp_path / "ours.jsonl", MARKS), results(tmp_path / "theirs.jsonl")


def run(*argv, files=None, judge=None, out: Path, code=0, workers=3) -> tuple[dict, bytes]:
    extra = [*SHORT, *QUICK, "--out", out, "--workers", workers]
    extra += ["--a", files[0], "--b", files[1]] if files else []
    extra += ["--judge", judge] if judge else []
    assert cli.run([str(word) for word in ("eval", "inf-streams", GAMES, *extra, *argv)]) == code
    if code:
        return {}, b""
    data = (out / "report.json").read_bytes()
    return json.loads(data), data + (out / "report.md").read_bytes() + (out / "score_segments.jsonl").read_bytes()


@pytest.fixture
def undisturbed(files, tmp_path):
    with Server().serving() as server:
        return run(files=files, judge=server.judge, out=tmp_path / "undisturbed", workers=1)


def test_known_verdicts(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server().serving() as server:
        report, data = run(files=files, judge=server.judge, out=tmp_path / "run")
        assert len(server.requests) == 14 and {r["authorization"] for r in server.requests} == {"Bearer sk-secret"}
        assert run(files=files, judge=server.judge, out=tmp_path / "run")[1] == data  # nothing is asked again
        assert len(server.requests) == 14
    total = report["votes"]["total"]
    assert (total["pairs"], total["votes_a"], total["votes_b"], total["ties"], total["wins_a"], total["wins_b"]) == (7, 8, 6, 2, 3, 2)
    assert (total["refusals"], total["malformed"], total["undecided"]) == (0, 0, 0)
    assert total["win_rate_a"] == 0.5714 and total["wilson_95"] == [0.2505, 0.8418]  # 8 of 14 votes; seven pairs
    assert total["first_shown"] == round(9 / 14, 4)  # half of the ten votes on the others, and all four on the two even pairs
    by_sport, by_fifth = report["votes"]["by_sport"], report["votes"]["by_fifth"]
    assert (by_sport["Youtube_NBA"]["votes_a"], by_sport["Youtube_NBA"]["votes_b"]) == (3, 3)
    assert (by_sport["Youtube_Soccer"]["votes_a"], by_sport["Youtube_Soccer"]["votes_b"]) == (5, 3)
    assert sum(row["pairs"] for row in by_fifth.values()) == 7 and by_fifth["3 of 5"]["pairs"] == 3  # middles 19 of 40, 19 of 34, 9 of 16
    scores = [json.loads(line) for line in (tmp_path / "run" / "score_segments.jsonl").read_text().splitlines()]
    assert [row["winner"] for row in scores] == ["A", "equal", "B", "A", "A", "equal", "B"]
    assert scores[1]["judge"] == {"model": "judge-1", "vote_ab": "A", "vote_ba": "B"} and scores[1]["votes"] == {"A": 1, "B": 1}
    assert "57.1%" in capsys.readouterr().out and "secret" not in "".join(p.read_text() for p in (tmp_path / "run").rglob("*.json*"))


def test_texts_are_cut_as_published(tmp_path):
    long = results(tmp_path / "long.jsonl", ("x" * 9_000,) * 7)
    with Server().serving() as server:
        run(files=(long, results(tmp_path / "theirs.jsonl")), judge=server.judge, out=tmp_path / "run")
        assert {max(map(len, shown(body)[1:])) for body in server.requests} == {LONGEST}
        assert all(body["temperature"] == 0 for body in server.requests)


@pytest.mark.parametrize("kind", ["timeout", "429", "500", "truncated", "cut off"])
def test_failures_are_mended(kind, files, tmp_path, undisturbed):
    def fault(body, attempt):
        return kind if attempt < (1 if kind == "timeout" else 2) and "0" in shown(body)[1] + shown(body)[2] else None

    with Server(fault=fault).serving() as server:
        assert run(files=files, judge=server.judge, out=tmp_path / "run")[1] == undisturbed[1]
        assert len(server.answered) == 14 and max(server.answered.values()) == 1
        waits = [b - a for times in server.times.values() for a, b in itertools.pairwise(times)]
        assert len(waits) == (2 if kind == "timeout" else 4) and (kind != "429" or min(waits) >= 0.2)  # Retry-After
    counted = json.loads((tmp_path / "run" / "requests.json").read_text())
    name = "broken JSON" if kind in ("truncated", "cut off") else kind
    assert counted == {"answer_tokens": 14, "prompt_tokens": 1400, "verdict": 14, name: len(waits)}


def test_prose_and_refusals_are_no_votes(files, tmp_path, capsys, undisturbed):
    def fault(body, attempt):
        _, first, second = shown(body)
        if "3" in first:  # once, and then a letter
            return "say: Both have their merits, but on balance I would say" if attempt == 0 else None
        if "0" in first:
            return "say: I'm sorry, but I can't help with that."
        return "say: Well, this is hard: B has pace, A has detail." if "4" in second and "strong" in first else None

    with Server(fault=fault).serving() as server:
        report, _ = run(files=files, judge=server.judge, out=tmp_path / "run")
        asked = len(server.requests)
        assert run(files=files, judge=server.judge, out=tmp_path / "run")[0] == report and len(server.requests) == asked
    total, before = report["votes"]["total"], undisturbed[0]["votes"]["total"]
    # pair 0 has lost both of its votes for A, pair 4 one of them
    assert (total["votes_a"], total["votes_b"], total["refusals"], total["malformed"], total["undecided"]) == (5, 6, 2, 1, 1)
    assert before["votes_b"] == total["votes_b"] and total["win_rate_a"] == round(5 / 11, 4)
    assert total["if_all_unclear_votes_were"] == {"b": round(5 / 14, 4), "a": round(8 / 14, 4)}
    counted = json.loads((tmp_path / "run" / "requests.json").read_text())
    assert (
        counted["refusal"] == 6 and counted["malformed"] == 3 + 2 and counted["verdict"] == 11
    )  # three asks each; pair 3 twice malformed once
    scores = [json.loads(line) for line in (tmp_path / "run" / "score_segments.jsonl").read_text().splitlines()]
    assert scores[0]["judge"]["vote_ab"] == "refusal" and scores[0]["winner"] == "equal"
    assert "6 refusal" in capsys.readouterr().err


def test_a_judge_that_changes_its_mind_is_asked_once(files, tmp_path):
    count = iter(range(1000))
    with Server(answer=lambda body: "AB"[next(count) % 2]).serving() as server:
        report, data = run(files=files, judge=server.judge, out=tmp_path / "run", workers=1)
        next(count)
        assert run(files=files, judge=server.judge, out=tmp_path / "run", workers=1)[1] == data and len(server.requests) == 14
        assert report["votes"]["total"]["votes_a"] + report["votes"]["total"]["votes_b"] == 14


def test_a_judge_that_stays_away_ends_the_run_and_loses_nothing(files, tmp_path, capsys, undisturbed):
    dead = [True]
    with Server(fault=lambda body, attempt: "500" if dead[0] and len(server.requests) > 6 else None).serving() as server:
        run("--tries", 3, files=files, judge=server.judge, out=tmp_path / "run", workers=2, code=1)
        error = capsys.readouterr().err.splitlines()[-1]
        assert "failed 3 times in a row" in error and "500" in error and error.startswith("svlm:")
        dead[0] = False
        assert run("--tries", 3, files=files, judge=server.judge, out=tmp_path / "run", workers=2)[1] == undisturbed[1]
        assert len(server.answered) == 14 and max(server.answered.values()) == 1


def test_no_temperature_where_none_is_taken(files, tmp_path, undisturbed):
    with Server(fault=lambda body, attempt: "400" if "temperature" in body else None).serving() as server:
        assert run(files=files, judge=server.judge, out=tmp_path / "run", workers=1)[1] == undisturbed[1]
        assert len(server.requests) == 15


def test_killed_at_random_points(files, tmp_path, undisturbed):
    """kill -9, in the middle of a request, until a run comes to its end: no verdict is lost, none is paid twice."""
    rng, out, kills = random.Random(7), tmp_path / "run", 0
    command = [sys.executable, "-m", "svlm_jax.cli", "eval", "inf-streams", GAMES, *SHORT, *QUICK, "--workers", 2]
    command += ["--out", out, "--a", files[0], "--b", files[1]]
    with Server().serving() as server:
        command += ["--judge", server.judge]
        while kills < 20:
            last = len(server.requests) + rng.randint(1, 7)
            child = subprocess.Popen(
                [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ)
            )
            server.arrived = lambda count, last=last, child=child: child.kill() if count == last else None
            error = child.communicate()[1]
            if child.returncode == 0:
                break
            assert child.returncode == -9, error
            kills += 1
            with open(out / "verdicts.jsonl", "ab") as journal:
                journal.write(b'{"key": "torn')  # as a kill in the middle of a write would leave it
        assert kills >= 2
        data = b"".join((out / name).read_bytes() for name in ("report.json", "report.md", "score_segments.jsonl"))
        assert data == undisturbed[1]
        keys = [row["key"] for row in map(json.loads, (out / "verdicts.jsonl").read_text().splitlines()) if row["outcome"] in "AB"]
        assert len(keys) == len(set(keys)) == 14
        assert len(server.requests) <= 14 + 2 * kills  # what was on its way when the process died


def test_verdicts_read():
    def verdict(text, refused=False):
        return read_verdict(Reply(text, refused, 0, 0))

    for text in (
        "A",
        " a.",
        "**A**",
        '"A"',
        "Answer: A",
        "The better commentary is A",
        "Candidate A",
        "<think>B? no</think>\n\nA",
        "A is better.",
        "My final answer: A",
        "Option A",
        "\\boxed{A}",
        "<answer>A</answer>",
    ):
        assert verdict(text) == "A", text
    assert verdict("B\n") == verdict("Commentary B is better") == "B"
    prose = ("A or B", "A and B are close", "An excellent pair", "B, because A is dull", "A is not better", "I think A is better")
    for text in ("", *prose, "Both", "C", "not A", "<think>B", "AB"):
        assert verdict(text) == "malformed", text
    assert verdict("A", refused=True) == verdict("I cannot judge these.") == verdict("I’m sorry, no.") == "refusal"


def test_intervals():
    assert wilson(0.5, 0) == (0.0, 1.0)
    assert wilson(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)  # Newcombe 1998: 5 of 10
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0.0, 20)[0] == 0 and wilson(0.0, 20)[1] == pytest.approx(0.16113, abs=1e-5)
    assert bootstrap([(3, 4)] * 5) == (0.75, 0.75) and bootstrap([]) == (0.0, 1.0)
    low, high = bootstrap([(1, 2), (2, 2), (0, 2), (2, 2)])
    assert 0 < low < 0.625 < high < 1.0 + 1e-9 and bootstrap([(1, 2), (2, 2), (0, 2), (2, 2)]) == (low, high)


def test_merging_shards(tmp_path):
    def row(start, end, *items):
        said = [{"response": text, "start_time": at, "end_time": at + 1} for at, text in items]
        return {"video": "Youtube_NBA/x.mp4", "chunk_start": start, "chunk_end": end, "items": said}

    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "result_1.jsonl").write_text(json.dumps(row(20, 22, (20, "c"), (21, " ..."))) + "\n")
    whole, half = row(10, 20, (10, "a"), (11, "b")), row(10, 11, (10, "lost"))
    (folder / "result_0.jsonl").write_text("\n".join(json.dumps(each) for each in (half, whole, half)))
    merged = read_results(folder)
    assert merged == {"x.mp4": Result(10, 22, (Piece(10, 11, "a"), Piece(11, 12, "b"), Piece(20, 21, "c"), Piece(21, 22, "")))}
    (folder / "merged_result.jsonl").write_bytes(merged_bytes(merged))
    assert read_results(folder / "merged_result.jsonl") == merged == read_results(folder)
    assert json.loads(merged_bytes(merged))["chunk_start"] == 10
    assert said_in(merged["x.mp4"], 10, 12) == "a b" and said_in(merged["x.mp4"], 11, 21) == "b c"
    overlapping = [("x", row(10, 14, (10, "a"), (13, "b"))), ("x", row(12, 16, (12, "again"), (13, "again"), (15, "c")))]
    for rows in (overlapping, overlapping[::-1]):
        assert merge(rows) == {"x.mp4": Result(10, 16, (Piece(10, 11, "a"), Piece(13, 14, "b"), Piece(15, 16, "c")))}
    with pytest.raises(UserError, match=r"shard 7: not a row"):
        merge([("shard 7", {"video": "x", "chunk_start": 1})])


def test_a_lost_shard_is_no_silence(files, tmp_path):
    """What no shard is of is neither judged nor measured, and the report names the game; also when it is merged before."""
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    first = rows.pop(0)
    for start, end in ((4, 14), (24, 40)):
        said = [item for item in first["items"] if start <= item["start_time"] < end]
        rows.append(first | {"chunk_start": start, "chunk_end": end, "items": said})
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    merged = tmp_path / "merged.jsonl"
    merged.write_bytes(merged_bytes(read_results(files[0])))
    with Server().serving() as server:
        found = [
            run(files=(ours, files[1]), judge=server.judge, out=tmp_path / "run", workers=1)[0] for ours in (files[0], merged)
        ]
        assert len(server.requests) == 12
    report = found[0]
    assert report["votes"] == found[1]["votes"] and report["votes"]["total"]["pairs"] == 6
    assert report["coverage"]["a"] == found[1]["coverage"]["a"] and "gaps" not in report["coverage"]["b"]
    assert (report["coverage"]["a"]["segments"], report["coverage"]["a"]["gaps"]) == (6, ["aQ1xTn3vK2c.mp4"])
    assert report["measures"]["a"]["seconds"] == report["measures"]["b"]["seconds"] - 10


def test_words_that_no_file_can_hold(files, tmp_path):
    """Half of a surrogate pair, as JSON may spell it, and names that need escaping in a table."""
    text = files[0].read_text().replace("strong 0", "strong \\ud83d 0 \\ud83d\\ude00")
    files[0].write_text(text)
    named = [f"Ours|é={files[0]}", f"b={files[1]}"]
    with Server(answer=lambda body: "A\ud83d" if "0" in shown(body)[1] else by_marks(body)).serving() as server:
        report, _ = run(files=named, judge=server.judge, out=tmp_path / "run")
    assert report["votes"]["total"]["malformed"] == 0 and report["contestants"]["a"]["name"] == "Ours|é"
    assert "| Ours\\|é |" in (tmp_path / "run" / "report.md").read_text()


def test_segments_and_history():
    games = read_games(GAMES)
    found = [(s.video[0], s.start, s.end, s.fifth) for s in segments()]
    assert found == [
        ("a", 4, 14, 1),
        ("a", 14, 24, 2),
        ("a", 24, 34, 3),
        ("b", 4, 14, 1),
        ("b", 14, 24, 2),
        ("b", 24, 34, 4),
        ("c", 4, 14, 2),
    ]
    assert games[0].sport == "Youtube_NBA" and games[0].end == 40
    before = "Here is Okafor bringing it up for the Herons, guarded by Lindqvist. Okafor to the elbow, kicks it out to Ramirez. Ramirez"
    assert games[0].before(6.11) == before
    assert [len(cut_segments(games, 4.0, 10.0, words)) for words in (30, 31, 38, 46)] == [7, 5, 2, 0] and cut_segments(games, 1000.0, 100.0, 0) == []


@pytest.mark.parametrize(("seconds", "count"), [(None, 1), (25, 15), (100, 4), (500, 1)])
def test_chunks_cover_a_game_and_know_what_was_said(seconds, count):
    """370 seconds of video from the second 1,000 on, one word a second: each chunk begins after all words up to it."""
    game = Game("NBA/x.mp4", "", "NBA", tuple(Piece(t, t + 1, f"w{t}") for t in range(1370)))
    found = watches(argparse.Namespace(start=1000.0, chunk_seconds=seconds, videos="videos"), [game])
    assert len(found) == count and (found[0].start, found[-1].end) == (1000, 1370)
    assert all(before.end == after.start for before, after in itertools.pairwise(found))
    assert all(watch.end - watch.start <= (seconds or 370) for watch in found)
    for watch in found:
        assert watch.previous.split() == [f"w{t}" for t in range(int(watch.start))]


def test_published_segments(files, tmp_path):
    rows = []
    for segment in segments()[:2]:
        game = next(game for game in read_games(GAMES) if game.name == segment.video)
        said = [list(piece) for piece in game.said if segment.start <= piece.start < segment.end]
        rows.append({"video": f"elsewhere/{game.name}", "title": game.title, "content": said, "preasr": ""})
    path = tmp_path / "segments.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with Server().serving() as server:
        report, _ = run("--segments", path, files=files, judge=server.judge, out=tmp_path / "run")
    assert report["votes"]["total"]["pairs"] == 2


def test_measures_by_hand():
    said = (
        Piece(0, 10, "Here comes Okafor. He passes to Ramirez,"),
        Piece(10, 20, "and Ramirez scores for the Herons."),
        Piece(20, 30, "Well done by Okafor."),
    )
    game = Game("x.mp4", "Herons at Owls", "all", said)
    assert names(["Here comes Okafor. He passes to Ramirez's man, and Well done"]) == {"Okafor": 1, "Ramirez": 1, "Well": 1}
    assert names(["Silva runs. Now Silva, who else? Great work. A great day"]) == {"Silva": 2}
    items = (Piece(0, 5, "And okafor is on the ball"), Piece(5, 10, ""), Piece(15, 20, "Ramirez scores, and it is Lopez again"))
    items += (Piece(20, 25, "he scores and it is Lopez again"), Piece(29, 30, "Owls"))
    parts = cut_segments([game], 0, 30, 1)
    whole, bins = measure([game], parts, {"x.mp4": Result(0, 30, items)}, {"x.mp4": 0.0}, bins=3)
    assert whole.seconds == 30 and whole.words_a_second == 21 / 30 and whole.silence == pytest.approx(1 - 16 / 30)
    assert whole.coverage == 2 / 3  # of Okafor, Ramirez and Herons, two
    assert whole.invented == 0.5  # Lopez twice; not Ramirez, and not Owls, which the title has
    assert whole.repetition == 3 / 18  # scores and it is | and it is Lopez | it is Lopez again
    assert (whole.delay, whole.delays) == (12.5, 2)  # Okafor by 5 s and Ramirez by 20 s, which the first piece has
    long, halves = measure([game], parts, {"x.mp4": Result(0, 30, (Piece(10, 25, "one two three"),))}, {"x.mp4": 0.0}, bins=2)
    assert long.words_a_second == 0.1 and [part.words_a_second for part in halves] == pytest.approx([1 / 15, 2 / 15])  # 5 s and 10 s of it
    assert bins[1].silence == 0.5 and [part.words_a_second for part in bins] == [0.6, 0.7, 0.8]


def test_cost(tmp_path, files, capsys):
    rates = [
        {"fps": 2.0, "streams": n, "chunk_seconds": 1.0, "mode": "streaming", "pipelined_round_ms": ms}
        | {"device": "H100", "commit": "c", "date": "2026-01-02"}
        for n, ms in ((1, 150.0), (4, 300.0))
    ]
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(rates))
    assert cli.run(["eval", "inf-streams", "--dry-run", "--rates", str(path), "--price", "1.25,10"]) == 0
    out = capsys.readouterr().out
    assert "at most 16.19 million tokens in (20.27 at 1.25 in" in out  # (8,000 x 3 + the prompt) / 4, 2,640 times
    assert "36.8 hours of stream" in out and "1.5 hours" not in out and "device: 5.5 hours on one H100" in out and "2,640 questions" in out
    assert cli.run(["eval", "inf-streams", "--dry-run", "--rates", str(path), "--streams", "6"]) == 0
    assert "device: 2.8 hours" in capsys.readouterr().out  # 4 streams in 300 ms
    args = ["eval", "inf-streams", str(GAMES), *map(str, SHORT), "--dry-run", "--a", str(files[0]), "--b", str(files[1]), "--price", "2,8"]
    assert cli.run(args) == 0
    out = capsys.readouterr().out
    assert "3 games, 7 segments" in out and "14 questions" in out and "device" not in out and "at 2 in and 8 out" in out
    assert cli.run(["eval", "inf-streams", "--dry-run"]) == 0
    assert "5.5 hours on one NVIDIA H100" in (out := capsys.readouterr().out) and "(3.29 at 1.25 in and 10 out a million)" in out
    with Server().serving() as server:
        run(files=files, judge=server.judge, out=tmp_path / "run")
    assert "judge-1: 14 questions to ask, about " in capsys.readouterr().err
    with open(tmp_path / "run" / "verdicts.jsonl", "a") as journal:
        journal.write('{"torn')
    assert cli.run([*args, "--out", str(tmp_path / "run")]) == 0
    assert "by the 14 answers in" in (out := capsys.readouterr().out) and "of 100 tokens in and 1 out: 1,400 tokens in (0.00 at 2 in" in out
    judged = cost.judging("p" * 100, [(9_000, 50, 50)])
    assert judged == (2, round(2 * 8_200 / 4), 2)
    assert cost.read_rate(None, fps=2.0, streams=1).round_ms > 0  # the measured ones
    assert cli.run(["eval", "inf-streams", "--dry-run", "--rates", str(path), "--fps", "7"]) == 1
    assert "has no round at 7 frames a second" in capsys.readouterr().err


def test_livesports(tmp_path, capsys):
    events = read_events(EVENTS)

    def predictions(path, *texts):
        rows = [
            {"video_id": e.video_id, "event_id": e.event_id, "begin": e.begin, "end": e.end, "pred": t}
            for e, t in zip(events, texts, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    a = predictions(tmp_path / "ours.jsonl", "strong 1: Harrow takes it", "even 2", "weak 3")
    b = predictions(tmp_path / "theirs.jsonl", "1", "2", "3")
    with Server().serving() as server:
        command = ["eval", "livesports", EVENTS, "--a", a, "--b", b, "--judge", server.judge, "--out", tmp_path / "run", *QUICK]
        assert cli.run([str(word) for word in command]) == 0
        assert shown(server.requests[0])[0] in {event.reference for event in events}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    total = report["votes"]["total"]
    assert (total["votes_a"], total["votes_b"], total["ties"], total["win_rate_a"]) == (3, 3, 1, 0.5)  # of 2N = 6 votes
    assert report["votes"]["by_sport"]["Rowing"]["votes_b"] == 2 and report["measures"]["a"]["coverage"] == 0.3333  # Harrow; not Mbeki, in two events
    assert cli.run(["eval", "livesports", str(EVENTS), "--dry-run", "--a", str(a), "--b", str(b)]) == 0
    assert "3 events" in capsys.readouterr().out


def test_one_line_for_each_mistake(files, tmp_path, capsys):
    def fails(*argv, code=1):
        assert cli.run([str(word) for word in ("eval", "inf-streams", *argv)]) == code
        error = capsys.readouterr().err
        *progress, last = error.splitlines()
        assert last.startswith("svlm: ") and not any("svlm: " in line for line in progress)
        return last

    out, a = ("--out", tmp_path / "run"), ("--a", files[0])
    assert "--a is needed" in fails(GAMES, *out, code=2)
    assert "--judge needs --b" in fails(GAMES, *a, *out, "--judge", "http://x/v1#m", code=2)
    for flag, value in (("--plots", "x.txt"), ("--price", "inf,1"), ("--min-words", "-5")):
        with pytest.raises(SystemExit):
            cli.run(["eval", "inf-streams", str(GAMES), f"{flag}={value}"])
        assert f"argument {flag}: '{value}' must" in capsys.readouterr().err
    assert "x.png cannot be written" in fails(GAMES, *a, *out, *SHORT, "--plots", files[0] / "x.png")
    assert "--fps must be positive" in fails(GAMES, *a, *out, *SHORT, "--fps", 0, code=2)
    assert "25 to 500" in fails(GAMES, *a, *out, "--chunk-seconds", 600, code=2)
    assert "is no endpoint" in fails(GAMES, *a, "--b", "http://x/v1", *out)
    assert "no such result file" in fails(GAMES, "--a", tmp_path / "no.jsonl", *out, *SHORT)
    assert "ends before --start" in fails(GAMES, *a, *out)
    assert "cannot be read" in fails(tmp_path / "no.jsonl", *a, *out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"video": "x", "content": [[1, 2, "a"]]}\n{"video": 3')
    assert "line 2 is no JSON object" in fails(broken, *a, *out)
    broken.write_text('{"video": "x", "content": [[1, "soon", "a"]]}\n')
    assert "row 1: no video, title and content" in fails(broken, *a, *out)
    broken.write_text('{"video": "a/x", "content": [[1, 2, "a"]]}\n{"video": "b/x", "content": [[1, 2, "a"]]}\n')
    assert "two rows are of x" in fails(broken, *a, *out)
    with Server(fault=lambda body, attempt: None).serving() as server:
        url = server.url
    assert "failed 1 times in a row, the last time with connection" in fails(
        GAMES, *a, "--b", files[1], *out, *SHORT, "--judge", f"{url}#m", "--tries", 1, "--workers", 1
    )  # fmt: skip
    with pytest.raises(UserError, match="begun with metadata"), run_folder(tmp_path / "run", {"benchmark": "inf-streams", "start": 5.0}):
        pass
    with (
        run_folder(tmp_path / "mine", {}),
        pytest.raises(UserError, match="another run is at work"),
        run_folder(tmp_path / "mine", {}),
    ):
        pass


def test_contestants_by_their_form(tmp_path):
    assert parse_contestant("gpt=https://host/v1/chat/completions#gpt-4o-mini").endpoint.url == "https://host/v1"
    assert parse_contestant("org/name").model == "org/name" and parse_contestant("ours=models/x").name == "ours"
    (tmp_path / "shard.jsonl").touch()
    assert parse_contestant(str(tmp_path)).results == tmp_path
    (tmp_path / "config.json").touch()
    assert parse_contestant(str(tmp_path)).model == str(tmp_path)


def test_journal(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1}, {"b": "é"})
        size = journal.size
        journal.append({"c": 3})
    path.write_bytes(path.read_bytes() + b'{"d": ')
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}, {"b": "é"}, {"c": 3}]
        journal.cut(size)
        assert journal.rows == [{"a": 1}, {"b": "é"}]
        with pytest.raises(UserError, match="not as the run left it"):
            journal.cut(size + 100)
    path.write_bytes(b"[1]\n")
    with pytest.raises(UserError, match="line 1 is no JSON object"):
        Journal(path)


def test_plots(files, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "plots" / "time.png"
    command = ["eval", "inf-streams", GAMES, *SHORT, "--a", files[0], "--b", files[1], "--out", tmp_path / "run", "--plots", picture]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        assert cli.run([str(word) for word in command]) == 0 and picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run([str(word) for word in command]) == 1
    assert re.fullmatch(r"svlm: plots need matplotlib.*\n", capsys.readouterr().err)


def test_marks_are_as_the_server_reads_them():
    def body(a, b):
        return {"messages": [{}, {"content": f"Reference transcript:\nr\n\nCommentary A:\n{a}\n\nCommentary B:\n{b}"}]}

    assert [by_marks(body(*pair)) for pair in (("strong", "x"), ("x", "strong"), ("weak", "x"), ("x", "weak"), ("x", "y"))] == list("ABBAA")
