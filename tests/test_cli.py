"""The command line: its flags, which other tools rely on, and one clear line for whatever is wrong."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest

from svlm_jax import cli
from svlm_jax.commands import UsageError
from svlm_jax.commands.flags import add_arguments
from svlm_jax.config import StreamConfig
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.errors import UserError

FLAGS = """
VIDEO
--model DIR
--weights DIR
--dtype {float32,bfloat16}
--quantize {int8,fp8,fp8_products}
--mesh data=N,tensor=N
--out FILE []
--truth FILE.jsonl
--start SECONDS 0.0
--duration SECONDS
--no-compilation-cache
--fps RATE 2.0
--chunk SECONDS 1.0
--max-pixels N 602112
--vision-window ROUNDS 16
--text-window ROUNDS 16
--text-sink TOKENS 512
--text-sliding TOKENS 512
--text-refresh ROUNDS 0
--text-capacity TOKENS 8192
--mode {streaming,full,windows,recompute} 'streaming'
--positions {contiguous,append} 'contiguous'
--kv {int8}
--capacity-rounds ROUNDS 64
--query TEXT 'Commentate on this match'
--question TEXT@SECONDS []
--previous-text TEXT ''
--max-new-tokens N 20
--temperature T 0.9
--top-k K
--top-p P
--repetition-penalty P 1.05
--seed N 0
"""


def described(action: argparse.Action) -> str:
    name = action.option_strings[0] if action.option_strings else ""
    value = f"{{{','.join(action.choices)}}}" if action.choices else action.metavar or ""
    usual = getattr(StreamConfig(), action.dest) if action.default == argparse.SUPPRESS else action.default  # unless the model says otherwise
    default = "" if usual is None or usual is False else repr(usual)
    return " ".join(part for part in (name, value, default) if part)


def test_the_flags_are_frozen():
    """A flag that is renamed or gone breaks the scripts of others; one that is new is added here."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    assert [described(action) for action in parser._actions] == FLAGS.strip().splitlines()
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"]])
def test_help_waits_for_no_heavy_import(arguments):
    code = (
        f"import sys\nfrom svlm_jax.cli import run\ntry: run({arguments})\nexcept SystemExit as stop: print(stop.code, sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "usage: svlm" in done.stdout and "\n0 [" in done.stdout, done.stderr
    assert not any(f"'{name}'" in done.stdout for name in ("jax", "numpy", "av"))


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        cli.run(["caption", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {code}  " in text for code in (0, 1, 2, 130, 141, 143))
    assert all(f"  {name} " in cli.make_parser().format_help() for name in cli.COMMANDS)


def test_a_command_fails_in_one_line(capsys):
    def fail(error):
        def work(_):
            raise error

        return work

    nothing = argparse.Namespace()
    assert cli.guarded(lambda _: None, nothing) == 0
    assert cli.guarded(fail(UserError("the disk\nis full")), nothing) == 1
    assert cli.guarded(fail(UsageError("no such flag")), nothing) == 2
    assert cli.guarded(fail(BrokenPipeError()), nothing) == 141
    assert cli.guarded(fail(KeyboardInterrupt("stopped at 00:00:07")), nothing) == 130
    assert cli.guarded(fail(cli.Terminated()), nothing) == 143
    assert capsys.readouterr().err == "svlm: the disk is full\nsvlm: no such flag\nsvlm: stopped at 00:00:07\nsvlm: stopped\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        cli.guarded(lambda _: 1 // 0, nothing)


# Bad flags: exit code 2, before anything is done


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--fps", "2", "--chunk", "0.7"], "gives 1.4 frames a round, not a whole number: the nearest that works is --chunk 0.5"),
        (["--fps", "fast"], "'fast' is not a number"),
        (["--fps", "nan"], "'nan' is not a number"),
        (["--text-window", "1"], "--text-window must be at least 2 rounds, not 1"),
        (["--text-sink", "off"], "--text-sink and --text-sliding must be given both or be off both"),
        (["--text-sink", "few"], "'few' must be a number of tokens, or off"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--mode", "full", "--positions", "append"], "--positions append needs --mode streaming"),
        (["--seed", "1" + "0" * 20], "--seed must be an integer of 64 bits"),
        (["--text-capacity", "-5"], "--text-capacity must not be negative, but is -5"),
        (["--start", "-1"], "-1 must not be negative"),
        (["--duration", "0"], "0 must be positive"),
        (["--out", "captions.txt"], "captions.txt must end in .vtt, .srt or .jsonl"),
        (["--question", "Who scored?"], "'Who scored?' must be a text, @ and a time in seconds"),
        (["--question", "@3"], "'@3' must be a text, @ and a time in seconds"),
        (["--weights", "tuned"], "--weights needs --model"),
        (["--temprature", "1"], "unrecognized arguments: --temprature"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag(capsys, arguments, told):
    try:
        code = cli.run(["caption", *arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert told in err and err.startswith("svlm: ") and err.count("\n") == 1


# Bad input: exit code 1, and no word about it but one line


def write_sound(path):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))


@pytest.fixture
def places(tmp_path):
    """What the cases below name."""
    clip = sample_path().read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "corrupt.mp4").write_bytes(bytes(1000) + clip[1000:3000])
    (tmp_path / "notes.mp4").write_text("not a video\n" * 100)
    write_sound(tmp_path / "sound.m4a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "kept.vtt").write_text("WEBVTT\n\nkept")
    for name in ("mute", "odd", "bare", "torn", "endless"):
        shutil.copytree(tiny_path(), tmp_path / name)
    (tmp_path / "mute" / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    (tmp_path / "endless" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": float("inf")}))
    (tmp_path / "bare" / "model.safetensors").unlink()
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return tmp_path


BAD_INPUT = {
    "no name": ([""], "the video's name is empty: name a file or a URL"),
    "missing video": (["no.mp4"], "no.mp4: there is no such file: check the path"),
    "folder": (["folder"], "folder is a folder: name a video file in it"),
    "empty video": (["empty.mp4"], "empty.mp4 is empty: fetch or record it again"),
    "corrupt video": (["corrupt.mp4"], "corrupt.mp4 cannot be opened"),
    "text": (["notes.mp4"], "notes.mp4"),
    "sound only": (["sound.m4a"], "sound.m4a has no video stream (it holds audio): give a file with pictures"),
    "start after the end": (["--start", "99"], "so it cannot start at 99 s: give a smaller --start"),
    "unknown model": (["--model", "models/none"], "models/none is not a directory here, and could not be had from the Hub"),
    "not a model": (["--model", "folder"], "no config.json in folder"),
    "a file as model": (["--model", "file"], "file is not a directory: pass the one that a Hugging Face model was downloaded to"),
    "no tokenizer": (["--model", "mute"], "no tokenizer in mute: it needs tokenizer.json"),
    "no weights": (["--model", "bare"], "no weights in bare: it needs model.safetensors"),
    "config of another model": (["--model", "odd"], "odd lacks model.layers.3."),
    "config beyond numbers": (["--model", "endless"], "endless/config.json has rms_norm_eps = inf, which is not a number that it can be"),
    "weights cut off": (["--model", "torn"], "torn/model.safetensors"),
    "out in no folder": (["--out", "none/a.vtt"], "none/a.vtt"),
    "out is a folder": (["--out", "folder.vtt"], "folder.vtt"),
    "out twice": (["--out", "a.vtt", "--out", "./a.vtt"], "name each caption file once"),
    "too large": (["--vision-window", "100000000"], "lower --vision-window"),
    "too long turns": (["--max-new-tokens", "1000000000"], "--max-new-tokens"),
    "too few pixels": (["--max-pixels", "100"], "give at least 784"),
    "question after the end": (["--question", "Who?@999"], "the question 'Who?' at 999 s is outside of what is captioned, 0 s to "),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(places, monkeypatch, capsys, case):
    arguments, told = BAD_INPUT[case]
    (places / "folder.vtt").mkdir()
    monkeypatch.chdir(places)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(os.listdir())
    assert cli.run(["caption", *arguments, "--out", "kept.vtt"]) == 1
    out, err = capsys.readouterr()
    error = err.strip().splitlines()[-1]
    assert out == "" and error.startswith("svlm: ") and told in error, err
    assert "Traceback" not in err and err.count("svlm: ") == 1
    assert (places / "kept.vtt").read_text() == "WEBVTT\n\nkept"  # an earlier run's captions are safe until there are new ones
    assert sorted(os.listdir()) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_out_that_may_not_be_written(places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    (places / "kept.vtt").chmod(0o400)
    assert cli.run(["caption", "--out", "kept.vtt"]) == 1
    assert "kept.vtt" in capsys.readouterr().err
