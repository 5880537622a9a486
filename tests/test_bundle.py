"""What a fresh install shows: the clip is what its recipe makes, and the model says what happens in it, whoever asks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import svlm_jax
from svlm_jax import cli
from svlm_jax.api import Commentary
from svlm_jax.checkpoints.stream_settings import read_stream_settings
from svlm_jax.commands.truth import Truth
from svlm_jax.config import StreamConfig
from svlm_jax.data.annotations import AnnotationFile
from svlm_jax.data.video import probe, read_rounds
from svlm_jax.demo import bundle
from svlm_jax.demo.bundle import clip_path, model_path
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.commentary import Claim, claims, commentate
from svlm_jax.demo.film import annotate
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.demo.match import simulate
from svlm_jax.demo.picture import Painter
from svlm_jax.errors import UserError
from svlm_jax.serving import server
from svlm_jax.streaming.engine import Engine, scan_compiled

ROOT = Path(__file__).parent.parent
SECONDS = 20


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> tuple[list[dict], str]:
    """The rounds of serve.py without a video and without a model, and what it shows."""
    out = tmp_path_factory.mktemp("first") / "said.jsonl"
    command = [sys.executable, str(ROOT / "serve.py"), "--truth", f"--duration={SECONDS}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "bundled model" not in done.stderr and "random weights" not in done.stderr  # nothing to excuse
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()], done.stdout


def test_the_clip_is_what_its_recipe_makes():
    assert bundle.__doc__ is not None
    (recipe,) = re.findall(r"svlm (demo match .*)", bundle.__doc__)
    args = cli.make_parser("demo").parse_args(recipe.split())
    match = simulate(args.seed, 60 * args.minutes)
    assert args.seed < 1000 and ROOT / args.out == clip_path()
    truth = AnnotationFile(clip_path().with_suffix(".jsonl"), keep_index=False)
    assert truth.annotation(0) == annotate(clip_path().name, match.seconds, commentate(match))
    info = probe(str(clip_path()))
    assert (info.duration, info.width, info.height, info.frame_rate) == (match.seconds, *args.size, args.fps)
    painter = Painter(match, info.height, info.width)
    for second in (0, 30):  # the board of a new game, and play
        stored = next(read_rounds(clip_path(), fps=2, chunk_seconds=1, start=second, size=(info.height, info.width))).frames[0]
        assert np.abs(stored.astype(int) - painter(second)).mean() < 6


def told(text: str) -> list[Claim | None]:
    return [claim for _, claim in claims(text)]


def test_the_first_run_tells_what_happens(first_run):
    rounds, shown = first_run
    assert [r["start"] for r in rounds] == list(range(SECONDS))
    truth = Truth.beside(str(clip_path()))
    said = {int(r["start"]): told(r["text"]) for r in rounds}
    assert all(claim is not None for claims in said.values() for claim in claims), [r["text"] for r in rounds]
    claimed = {(i, claim) for i, claims in said.items() for claim in claims if claim}
    really = {(i, claim) for i in range(SECONDS) for claim in told(truth.said(i, i + 1)) if claim}
    assert len(really) > SECONDS // 4
    right = len(claimed & really)
    assert right >= 0.9 * len(claimed) and right >= 0.9 * len(really), claimed ^ really  # team, player and second
    for r in rounds:
        assert r["text"] in shown and truth.said(r["start"], r["end"]) in shown  # side by side


def test_all_drivers_say_the_same_of_the_clip():
    """Token for token: alone in the live loop, and as a batch in one program; past the window and with older words read anew."""
    model, rounds, starts = svlm_jax.load(dtype="float32"), 40, (0, 30)
    spec = Commentary(clip_path(), model).spec
    assert rounds > 2 * spec.stream.vision_window and rounds > 4 * spec.stream.text_refresh > 0
    size = spec.height, spec.width
    films = [list(read_rounds(clip_path(), fps=2, chunk_seconds=1, start=start, duration=rounds, size=size)) for start in starts]
    clips = np.stack([[video.frames.transpose(0, 3, 1, 2) for video in film] for film in films], 1)  # [rounds, streams, F, 3, height, width]
    times = [{row: (film[i].start, film[i].end) for row, film in enumerate(films)} for i in range(rounds)]

    batch = Engine(model.params, spec, model.tokenizer, streams=len(starts))
    for row in range(len(starts)):
        batch.open(row)
    first = batch.step(clips[0], times[0]).tokens()  # it has the query, and so is a program of its own
    prompts = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch.prompt(each) for each in times[1:]])
    _, turns = scan_compiled(batch.params, batch.state, clips[1:], prompts, batch._key)
    for row in range(len(starts)):
        alone = Engine(model.params, spec, model.tokenizer)
        alone.open(0)
        said = [alone.step(clips[i, [row]], {0: times[i][row]}).tokens()[0] for i in range(rounds)]
        assert said == [first[row], *(np.asarray(turns.tokens)[i, row, : turns.length[i, row]].tolist() for i in range(rounds - 1))]
        assert sum(len(tokens) > 1 for tokens in said) > rounds // 4  # there is something to differ in


def test_whoever_asks_gets_the_settings_that_the_model_was_trained_for(monkeypatch):
    """The command line, Python, with a model that is loaded or a path, and the server."""
    own = read_stream_settings(model_path())
    assert own["query"] and own["max_new_tokens"] > 1
    expected = StreamConfig(**{**own, "question_capacity": 0})  # room is made for questions that are asked
    assert Commentary(clip_path()).spec.stream == expected
    assert Commentary(clip_path(), svlm_jax.load()).spec.stream == expected
    assert Commentary(clip_path(), model_path(), fps=4.0, max_new_tokens=5).spec.stream == StreamConfig(
        **{**own, "question_capacity": 0, "fps": 4.0, "max_new_tokens": 5}
    )
    services = []
    monkeypatch.setattr(server, "serve", lambda service, bound, host: services.append(service) or 0)
    assert cli.run(["serve", "--port", "0", "--no-compilation-cache"]) == 0
    (service,) = services
    info = probe(str(clip_path()))
    assert service.spec.stream == StreamConfig(**own) and service.name == model_path().name and not service.random
    assert (service.shape.height, service.shape.width) == (info.height, info.width)  # nothing is lost by resizing


def test_of_other_videos_it_says_that_it_knows_nothing(monkeypatch, capsys):
    def stop(self, progress=None):
        raise UserError("that will do")

    monkeypatch.setattr(Commentary, "load", stop)
    for source, noted in (([str(sample_path())], True), ([], False), ([str(sample_path()), "--model", str(tiny_path())], False)):
        assert cli.run(["caption", *source]) == 1
        err = capsys.readouterr().err
        assert "that will do" in err and ("The bundled model knows nothing but matches" in err) == noted
