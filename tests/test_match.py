"""The simulated match: what happens in it, what is said about it, its pictures and files."""

import collections
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest

import svlm_jax
from svlm_jax.checkpoints.stream_settings import read_stream_settings, write_stream_settings
from svlm_jax.cli import run
from svlm_jax.data.annotations import AnnotationFile
from svlm_jax.data.chunks import ChunkConfig
from svlm_jax.data.video import read_rounds
from svlm_jax.demo import commentary, match, picture, training_data
from svlm_jax.demo.commentary import NUMBERS, Claim, claims, commentate, random_questions, round_of
from svlm_jax.demo.drill import drill
from svlm_jax.demo.film import FilmConfig, chunks, spoken, write_video
from svlm_jax.demo.history import Pasts, with_goals_before
from svlm_jax.demo.make_match_model import SETTINGS
from svlm_jax.demo.make_match_model import write as write_model
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.demo.make_tokenizer import make
from svlm_jax.demo.match import BREADTH, LENGTH, NEAR, TICK, TOUCHING, simulate
from svlm_jax.demo.match_vocabulary import VOCABULARY, corpus
from svlm_jax.errors import UserError
from svlm_jax.evaluation.match import KEYS, Said, report
from svlm_jax.tokenizer import Tokenizer

MINUTES = 20.0


@pytest.fixture(scope="module", params=[1, 2])
def played(request) -> match.Match:
    return simulate(request.param, 60 * MINUTES)


def test_a_seed_is_a_match_and_a_longer_one_begins_the_same(played):
    again = simulate(played.seed, 300.0)
    assert again.events == tuple(event for event in played.events if event.time < 300)
    np.testing.assert_array_equal(again.scenes[2000].players, played.scenes[2000].players)
    assert simulate(played.seed + 100, 300.0).events != again.events


def test_what_happens_and_how_often(played):
    kinds = collections.Counter(event.kind for event in played.events)
    assert set(kinds) <= set(match.KINDS) and len(kinds) >= 12
    assert kinds["new game"] == 2  # a new one after fifteen minutes
    gaps = np.diff([event.time for event in played.events])
    assert gaps.min() >= match.GAP - TICK  # so that two are never told in one round
    # Goals in one game, breaks left out
    goals = [event.time for event in played.events if event.kind == "goal"]
    assert all(100 < after - before < 420 for before, after in itertools.pairwise(goals))
    # The score is spoken at goals, in breaks and when games begin
    scores = [event.time for event in played.events if event.kind in ("goal", "break", "new game")]
    assert max(np.diff(scores)) < 150 and np.median(np.diff(scores)) < 90


def test_play_has_an_event_every_two_to_four_seconds(played):
    stopped = {"out", "foul", "miss", "goal", "break", "new game"}
    gaps = [b.time - a.time for a, b in itertools.pairwise(played.events) if a.kind not in stopped]
    assert 2 <= np.mean(gaps) <= 4


def test_players_keep_their_distance_and_the_pitch(played):
    places = np.stack([scene.players for scene in played.scenes if not scene.board])
    gaps = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1) + 99 * np.eye(10)
    assert gaps.min() > 0.75 * TOUCHING and np.quantile(gaps.min(axis=(1, 2)), 0.05) > 0.9 * min(NEAR, TOUCHING)
    assert np.abs(places[..., 0]).max() < LENGTH / 2 + 2 and np.abs(places[..., 1]).max() < BREADTH / 2 + 2
    pairs = [(a, b) for a, b in itertools.pairwise(played.scenes) if not (a.board or b.board)]
    assert max(np.linalg.norm(b.players - a.players, axis=1).max() for a, b in pairs) < 1.6  # metres in a tick, pushing included


def test_the_ball_is_where_events_say(played):
    """A quarter of a second later, when the first picture shows it."""
    for event in played.events:
        if event.kind not in ("pass", "tackle", "interception", "save") or event.time + 0.3 > played.seconds:
            continue
        scene, game = played.scene(event.time + 0.25), played.game(event.time)
        team, player = divmod(scene.holder, match.SIDE)
        who = (event.other_team, event.other) if event.kind == "pass" else (event.team, event.player)
        assert (team, game.shirts[team][player]) == who, event
        assert np.linalg.norm(scene.ball[:2] - scene.players[scene.holder]) < 5


def test_score_and_last_scorer(played):
    goals = [event for event in played.events if event.kind == "goal"]
    for event in goals:
        before, after = played.score(event.time - TICK), played.score(event.time)
        assert sum(after) == sum(before) + 1 and after[event.team] == before[event.team] + 1
        assert played.last_scorer(event.time) == (event.team, event.player)
    second = played.games[1].start
    assert played.score(second + 1) == (0, 0) and played.last_scorer(second + 1) is None


def test_every_event_is_told_once_in_words_that_can_be_read_back(played):
    lines, told = commentate(played), 0
    for event in played.events:
        index = round_of(event.time)
        if index >= played.seconds:
            continue
        assert -0.25 <= index - event.time <= 0.75
        (_, claim), *more = claims(lines[index].words)
        kits = played.game(event.time).kits
        assert claim is not None and not more and claim.kind == event.kind
        assert claim.player == event.player and claim.team == (None if event.team is None else kits[event.team])
        told += 1
    others = [claim.kind for line in lines.values() for _, claim in claims(line.words) if claim.kind in ("score", "scorer", "no scorer")]
    assert told + len(others) == sum(len(line.sentences) for line in lines.values())


def test_sentences_of_the_grammar_mean_one_thing():
    fill = {"T": "red", "P": "four", "O": "five", "U": "red", "W": "blue", "X": "two", "Y": "one", "L": "on the left"}
    tables = {
        **commentary.EVENT_SENTENCES,
        "score": commentary.SCORE_SENTENCES,
        "scorer": commentary.SCORER_SENTENCES,
        "no scorer": commentary.NO_SCORER_SENTENCES,
    }
    said = [(kind, text.format(**fill)) for kind, texts in tables.items() for text in texts]
    assert len({text for _, text in said}) == len(said)
    for kind, text in said:
        ((sentence, claim),) = claims(text)
        assert sentence == text and claim is not None and claim.kind == kind
    assert list(claims("the moon is full. red four scored last.")) == [
        ("the moon is full.", None),
        ("red four scored last.", Claim("scorer", "red", 4)),
    ]


def test_words_are_tokens_and_a_round_fits():
    tokenizer = Tokenizer(make(corpus(), VOCABULARY))
    played = simulate(5, 1800.0)
    words = {word for line in commentate(played).values() for word in re.findall(r" [a-z]+", f" {line.words}")}
    assert len(words) > 120 and all(len(tokenizer.encode_plain(word)) == 1 for word in words)
    assert all(len(tokenizer.encode_plain(f" {word}")) == 1 for word in (*match.KITS, *NUMBERS))
    lines = commentate(played, random_questions(played, 2.0)).values()
    longest = max(len(tokenizer.encode_plain(spoken(line) + " ...")) + 1 for line in lines)
    assert longest <= SETTINGS["max_new_tokens"]


def test_answers():
    played = simulate(4, 600.0)
    asked = random_questions(played, 5.0)
    lines = commentate(played, asked)
    for index, question in asked.items():
        kind, said = commentary.question_kind(question), lines[index].answer
        assert kind in commentary.ASKED
        now = index + 0.25
        if kind == "score":
            assert said == commentary.score_text(played, now)
        elif kind == "ball":
            assert (said == "nobody.") == (played.scene(index + 0.5).holder < 0 or played.scene(index + 0.5).board)
    with pytest.raises(ValueError, match="nobody knows"):
        commentary.answer(played, "who will win?", 10)


@pytest.mark.parametrize("of", [lambda played: played, drill], ids=["match", "drill"])
def test_the_answer_to_who_is_where_says_what_the_picture_shows(of):
    played = of(simulate(4, 60.0))
    scene, game, words = played.scene(30.5), played.game(30.5), commentary.answer(played, "who is where?", 30).rstrip(".").split()
    assert words[0] == "ball" and len(words) == 3 + 4 * 2 * match.SIDE
    found = [words[i : i + 4] for i in range(3, len(words), 4)]
    cells = [(NUMBERS.index(column), NUMBERS.index(row)) for column, row, _, _ in found]
    assert cells == sorted(cells)
    paint = picture.Painter(played)
    for (column, row), (_, _, kit, number) in zip(cells, found, strict=True):
        team = game.kits.index(kit)
        player = team * match.SIDE + game.shirts[team].index(NUMBERS.index(number))
        at = np.array([picture.WIDTH, picture.HEIGHT]) / 2 + (scene.players[player] - scene.camera) * paint.unit
        assert (column, row) == tuple((at // 28).astype(int) + 1)


def test_a_drill_tells_nothing_but_what_is_seen():
    """Every second is another moment of the match, of other teams; its two pictures and the ball's tail are of that moment."""
    played = simulate(4, 120.0)
    made = drill(played)
    assert made.seconds == 119 and len(made.scenes) == 1190 and made.events == ()
    before = {id(scene): tick for tick, scene in enumerate(played.scenes)}
    ticks = np.array([before[id(scene)] for scene in made.scenes[:-3]])
    assert sorted(ticks[::10]) == list(range(10, 1200, 10))
    for index in range(1, 118):  # from two ticks before a second to its second picture
        at = 10 * index
        assert (ticks[at - 2 : at + 6] == ticks[at] + np.arange(-2, 6)).all()
    games = [made.game(index + half) for index in range(119) for half in (0.0, 0.5)]
    assert games[::2] == games[1::2] and len({game.shirts for game in games}) > 110
    counts = np.bincount([number for game in games for team in game.shirts for number in team], minlength=10)[1:]
    assert (len(games) * 10 / 9 * 0.8 < counts).all()
    assert all(len(set(team)) == match.SIDE for game in games for team in game.shirts)


def test_training_data_have_their_sets_and_drills_no_commentary(tmp_path):
    tasks = [training_data.Task(1000 + i, 48.0, tmp_path, kind, 0.5) for i, kind in enumerate(("match", "opening", "drill"))]
    rows = training_data.write(tasks, tmp_path, 1)
    assert set(rows) == {"chunks", "asked", "openings", "placed", "glances", "dense"}  # there is no goal yet
    assert rows["glances"] == 12 and rows["chunks"] == 3
    for name, count in rows.items():
        file = AnnotationFile(tmp_path / f"{name}.jsonl")
        annotations = [file.annotation(row) for row in range(count)]
        assert len(annotations) == count and all((tmp_path / each.video).exists() for each in annotations)
        assert any(each.words for each in annotations) == (name not in ("placed", "glances"))
    file = AnnotationFile(tmp_path / "glances.jsonl")
    made = drill(simulate(1002, 48.0))
    for question in file.annotation(5).questions:
        assert question.answer.strip() == commentary.answer(made, question.question, int(question.asked))


def test_pictures_show_ball_numbers_and_kits():
    played = simulate(1, 60.0)
    paint = picture.Painter(played)
    shown = paint(30.0)
    assert shown.shape == (picture.HEIGHT, picture.WIDTH, 3) and shown.dtype == np.uint8
    scene, game = played.scene(30.0), played.game(30.0)
    corner = np.array([picture.WIDTH, picture.HEIGHT]) / 2 - scene.camera * paint.unit
    for player in range(10):
        x, y = np.rint(corner + scene.players[player] * paint.unit).astype(int)
        shirt, ink = picture.SHIRTS[game.kits[player // 5]]
        disc = shown[max(0, y - 7) : y + 8, max(0, x - 7) : x + 8].reshape(-1, 3).astype(int)
        for colour, least in ((shirt, 0.25), (ink, 0.03)):
            assert (np.abs(disc - colour).max(axis=1) < 40).mean() > least, (player, colour)
    assert (paint(2.0) != shown).any() and np.array_equal(picture.Painter(played)(30.0), shown)  # the same seed, the same pixels


def test_films_are_read_back(tmp_path):
    played = simulate(1, 12.0)
    write_video(played, tmp_path / "a.mp4", FilmConfig(fps=4, quality=12))
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    rounds = list(read_rounds(tmp_path / "a.mp4", fps=2, chunk_seconds=1, max_pixels=picture.HEIGHT * picture.WIDTH))
    assert len(rounds) == 12 and rounds[0].frames.shape == (2, picture.HEIGHT, picture.WIDTH, 3)
    paint = picture.Painter(played)
    drawn = [paint(number / 4) for number in range(42)][40]
    assert np.abs(rounds[10].frames[0].astype(int) - drawn).mean() < 4


def test_chunks_remember_what_was_said_before(played):
    lines = commentate(played, random_questions(played, 10.0))
    cut = list(chunks("a.mp4", played.seconds, lines, ChunkConfig(24, 12), memory=(64, 448)))
    said = [spoken(lines[index]) if index in lines else "" for index in range(int(played.seconds))]
    assert cut[0].previous == "" and cut[0].query and not cut[5].query
    assert cut[5].previous == "".join(said[:60])
    late = cut[-1].previous
    assert late.startswith("".join(said[:20])) and late.endswith("".join(said[int(cut[-1].start) - 60 : int(cut[-1].start)]))
    assert 512 <= len(late.split()) < 600
    words = [word.text for chunk in cut[::2] for word in chunk.words]
    assert words == [word for index in range(int(played.seconds)) if index in lines for word in lines[index].words.split()]


def running_score(texts, kits):
    """Scores and last scorers that sentences tell, each checked against the sentences before it; how many were."""
    score = scorer = None
    checked = 0
    for claim in (found for text in texts for _, found in commentary.claims(text) if found is not None):
        side = kits.index(claim.team) if claim.team in kits else None
        if claim.kind == "goal":
            score, scorer = score and (score[0] + (side == 0), score[1] + (side == 1)), (claim.team, claim.player)
        elif claim.kind == "score":
            assert score in (None, claim.goals)
            checked, score = checked + (score is not None), claim.goals
        elif claim.kind == "scorer":
            assert scorer in (None, (claim.team, claim.player))
            checked, scorer = checked + (scorer is not None), (claim.team, claim.player)
    return checked


def test_chunks_have_pasts_of_their_own_that_words_follow_from(played):
    questions = random_questions(played, 5.0)
    pasts, own = Pasts(played, questions, (64, 448)), commentate(played, questions)
    checked, scores, kept, mistaken = 0, set(), 0, 0
    for first in range(0, int(played.seconds) - 24, 30):
        said = [pasts(first, first + 24, np.random.default_rng(seed)) for seed in (1, 2)]
        same = [[line for index, line in lines.items() if index >= first - 90] for lines in said]
        for lines in said:
            remembered = [index for index in lines if index < first]
            words = sum(len(spoken(lines[index]).split()) for index in remembered)
            assert words >= 448 + 64 or remembered == [index for index in own if index < first]
            assert [index for index in lines if index >= first] == [index for index in own if first <= index < first + 24]
            recent = {index: line for index, line in lines.items() if index > first - 90}
            kits = {played.game(index + 0.25).kits for index in recent}
            if len(kits) == 1:
                checked += running_score([line.words for line in recent.values()], *kits)
            for index, line in recent.items():  # what pictures show is as it was; before, players may be taken for others
                told, true = ([each for _, each in claims(words) if each and each.kind in match.KINDS] for words in (line.words, own[index].words))
                assert told == true or (index < first and [each.kind for each in told] == [each.kind for each in true])
                assert line.words == own[index].words or told != true or not true
                mistaken += told != true
                if commentary.question_kind(line.question) == "score":
                    scores.add((index, line.answer))
        kept += same[0] == same[1]
    assert checked > 40 and len(scores) > 60
    assert mistaken > 200 and kept < 10 and len({index for index, _ in scores}) < 0.7 * len(scores)


def test_goals_made_up_come_before_and_all_else_stays(played):
    time = 700.0
    assert played.game(time) != played.game(played.seconds)
    seen = set()
    for seed in range(20):
        other = with_goals_before(played, time, np.random.default_rng(seed))
        later = [event for event in played.events if event.time > time]
        assert list(other.events[-len(later) :]) == later and {event.kind for event in other.events[: -len(later)]} <= {"goal"}
        assert list(other.events) == sorted(other.events, key=lambda event: event.time)
        goals = other.score(time)
        seen.add(goals)
        assert max(goals) <= 6 and (other.last_scorer(time) is None) == (goals == (0, 0))
        if sum(goals):
            team, number = other.last_scorer(time)
            assert number in played.game(time).shirts[team][1:]
        assert other.score(played.seconds) == played.score(played.seconds)  # of the next game
    assert len(seen) > 10


def test_chunks_around_goals(played):
    goals = [commentary.round_of(event.time) for event in played.events if event.kind == "goal"]
    spans = training_data.around_goals(played, 24, np.random.default_rng(1))
    assert len(spans) > 3.5 * len(goals)
    for start, end in spans:
        assert end - start == 24 and any(3 <= goal - start < 19 for goal in goals)


def test_the_truth_scores_full_marks(played):
    asked = random_questions(played, 30.0)
    lines = commentate(played, asked)
    said = [Said(i, spoken(lines[i]).strip() if i in lines else "", asked.get(i, "")) for i in range(int(played.seconds))]
    found = report([played], [said])
    for key in ("event_precision", "event_recall", "event_f1", "score_accuracy", "score_update_accuracy", "scorer_accuracy", "answer_accuracy"):
        assert found[key] == 1.0, key
    assert found["false_words_per_quiet_minute"] == 0.0 and found["timing_error_s"] < 0.5
    assert len(found["tenths"]["event_f1"]) == 10 and found["counts"]["events"] == len(played.events)


def test_mistakes_are_counted():
    played = simulate(1, 600.0)
    lines = commentate(played)
    said = [Said(i, lines[i].words if i in lines else "") for i in range(600)]

    def changed(**rounds: str) -> dict:
        return report([played], [[Said(each.round, rounds.get(f"r{each.round}", each.text)) for each in said]])

    whole, event = report([played], [said]), next(event for event in played.events if event.kind == "pass")
    index = round_of(event.time)
    # Another player; nothing; the same twice; words of no grammar; two seconds late
    wrong = lines[index].words.replace(f" {NUMBERS[event.player]} ", f" {NUMBERS[event.player % 9 + 1]} ")
    assert wrong != lines[index].words
    count = whole["counts"]["claims"]
    assert changed(**{f"r{index}": wrong})["event_precision"] == pytest.approx(1 - 1 / count)
    assert changed(**{f"r{index}": ""})["event_recall"] == pytest.approx(1 - 1 / len(played.events))
    twice = changed(**{f"r{index}": f"{lines[index].words} {lines[index].words}"})
    assert twice["event_precision"] == pytest.approx(count / (count + 1)) and twice["event_recall"] == 1.0 and twice["repetition"] > 0
    assert changed(**{f"r{index}": "how nice."})["event_precision"] == pytest.approx(1 - 1 / count)
    late = changed(**{f"r{index}": "", f"r{index + 2}": lines[index].words})
    assert late["event_recall"] < 1 and late["event_precision"] < 1
    # A wrong score: it is wrong, the goal after it as well where that is added to it
    goal = next(event for event in played.events if event.kind == "goal")
    told = max(i for i in lines if i < goal.time and any(claim.kind == "score" for _, claim in claims(lines[i].words)))
    kits = played.game(goal.time).kits
    found = changed(**{f"r{told}": f"it is {kits[0]} seven, {kits[1]} seven."})
    assert found["score_accuracy"] == pytest.approx(1 - 1 / whole["counts"]["scores"])
    assert found["score_update_accuracy"] == pytest.approx(1 - 1 / whole["counts"]["goals"])
    # Talk where there is nothing to say
    busy = {i + shift for i in lines for shift in (-1, 0, 1)}
    quiet = [i for i in range(600) if i not in busy]
    found = changed(**{f"r{quiet[0]}": "red four finds five."})
    assert found["false_words_per_quiet_minute"] == pytest.approx(4 / (len(quiet) / 60))


def test_the_command_writes_video_and_truth(tmp_path, capsys):
    out = tmp_path / "m.mp4"
    assert run(["demo", "match", "--minutes", "0.2", "--seed", "7", "--fps", "4", "--question-every", "4", "--out", str(out)]) == 0
    annotation = AnnotationFile(out.with_suffix(".jsonl")).annotation(0)
    assert annotation.video == "m.mp4" and annotation.end == 12.0 and annotation.questions
    assert " ".join(word.text for word in annotation.words) == " ".join(line.words for line in commentate(simulate(7, 12.0)).values())
    # Beside what a model says, here with random weights
    capsys.readouterr()
    quick = ["--model", str(tiny_path()), "--max-pixels", str(84 * 112), "--duration", "6", "--max-new-tokens", "2"]
    assert run(["caption", str(out), "--truth", *quick]) == 0
    shown = re.findall(r"\((.+)\)\n", capsys.readouterr().out)
    lines = commentate(simulate(7, 12.0))
    answers = {int(question.asked): question.answer.strip() for question in annotation.questions if question.asked < 6}
    told = [" ".join(filter(None, (answers.get(i), lines[i].words if i in lines else ""))) for i in range(6)]
    assert shown == [text for text in told if text]
    assert run(["caption", str(out), "--truth", str(tmp_path / "no.jsonl")]) == 1
    assert "no such annotation file" in capsys.readouterr().err
    for flags, told in (
        (["--out", "m.avi"], "must end in .mp4"),
        (["--out", str(out), "--minutes", "0"], "--minutes"),
        (["--out", str(tmp_path / "no" / "m.mp4")], "no folder"),
    ):
        assert run(["demo", "match", *flags]) == 2
        assert told in capsys.readouterr().err
    assert run(["demo", "match", "--out", str(tmp_path / "b.mp4"), "--fps", "0", "--minutes", "0.1"]) == 1
    assert not (tmp_path / "b.mp4").exists()


def test_evaluation_from_film_to_measures(tmp_path, capsys):
    """With random weights: words mean nothing, and are measured as such."""
    model, out, said = tmp_path / "model", tmp_path / "found.json", tmp_path / "said.jsonl"
    shutil.copytree(tiny_path(), model)
    write_stream_settings(model, {**SETTINGS, "max_pixels": 84 * 112})
    # float32: in bfloat16 a batch rounds elsewhere than one stream, and of two words as likely as each other says the other
    flags = ["eval", "match", "--minutes", "0.2", "--seed", "5", "--question-every", "4", "--dtype", "float32", "--json", str(out)]
    assert run([*flags, "--model", str(model), "--captions", str(said), "--video", str(tmp_path / "m.mp4"), "--vision-window", "3"]) == 0
    found = json.loads(out.read_text())
    assert set(KEYS) <= found.keys() and found["settings"]["vision_window"] == 3 and found["settings"]["text_sink"] == SETTINGS["text_sink"]
    assert found["counts"]["answers"] == sum("question" in json.loads(line) for line in said.read_text().splitlines()) > 0
    rows = [json.loads(line) for line in said.read_text().splitlines()]
    lines = commentate(simulate(5, 12.0), random_questions(simulate(5, 12.0), 4.0))
    assert [row["start"] for row in rows] == list(range(12))
    assert [row["truth"] for row in rows] == [spoken(lines[index]).strip() if index in lines else "" for index in range(12)]
    assert found["event_f1"] < 0.5
    # Who sees everything, and who does not look
    for name, low, high in (("truth", 1.0, 1.0), ("blind", 0.0, 0.3)):
        assert run(["eval", "match", "--minutes", "30", "--seed", "5", "--baseline", name, "--json", str(out)]) == 0
        assert low <= json.loads(out.read_text())["event_f1"] <= high
    assert "F1 of events" in capsys.readouterr().out
    # Several matches at once: each as if it were alone, counted together
    assert run([*flags, "--matches", "2", "--model", str(model), "--captions", str(said), "--video", str(tmp_path), "--vision-window", "3"]) == 0
    both, lines = json.loads(out.read_text()), [json.loads(line) for line in said.read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "seed"} for row in lines if row["seed"] == 5] == rows
    assert both["counts"]["events"] == sum(len(simulate(seed, 12.0).events) for seed in (5, 6)) and both["matches"][0]["event_f1"] == found["event_f1"]
    assert both["intervals"]["event_f1"] is None or both["intervals"]["event_f1"][0] <= both["event_f1"]
    assert run([*flags, "--model", str(model), "--vision-window", "0"]) == 2
    assert run(["eval", "match", "--minutes", "1", "--model", str(model), "--video", str(tmp_path / "m.mp4")]) == 1
    assert "another film" in capsys.readouterr().err


def test_settings_beside_the_weights(tmp_path, capsys):
    assert read_stream_settings(tmp_path) == {}
    write_stream_settings(tmp_path, SETTINGS)
    assert read_stream_settings(tmp_path) == SETTINGS
    wrong = {'{"fps": -1}': "--fps must be positive", '{"tempo": 1}': "no setting tempo", "{": "cannot be read", "[1]": "no setting 1"}
    for text, told in wrong.items():
        (tmp_path / "streaming.json").write_text(text)
        with pytest.raises(UserError, match=told):
            read_stream_settings(tmp_path)


def test_the_untrained_model_is_small_and_a_checkpoint_like_any_other(tmp_path):
    write_model(tmp_path / "model")
    assert read_stream_settings(tmp_path / "model") == SETTINGS
    model = svlm_jax.load(tmp_path / "model", dtype="bfloat16")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) <= 12_000_000
