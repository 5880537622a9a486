"""`svlm serve` before it serves: its flags, which scripts rely on, and one clear line for whatever is wrong."""

import argparse
import os
import subprocess
import sys

import pytest
from server import ROOT
from test_cli import described

from svlm_jax import cli
from svlm_jax.commands.serve import add_parser

FLAGS = """
--port P 8000
--host '127.0.0.1'
--streams N 4
--size WIDTHxHEIGHT
--api-key KEY []
--allow-files FOLDER []
--allow-host HOST []
--state FOLDER
--snapshot-every SECONDS
--model DIR
--weights DIR
--dtype {float32,bfloat16}
--quantize {int8,fp8,fp8_products}
--mesh data=N,tensor=N
--no-compilation-cache
--fps RATE 2.0
--chunk SECONDS 1.0
--max-pixels N 602112
--vision-window ROUNDS 16
--text-window ROUNDS 16
--text-sink TOKENS 512
--text-sliding TOKENS 512
--text-refresh ROUNDS 0
--positions {contiguous,append} 'contiguous'
--kv {int8}
--query TEXT 'Commentate on this match'
--max-new-tokens N 20
--temperature T 0.9
--top-k K
--top-p P
--repetition-penalty P 1.05
--seed N 0
"""


def test_the_flags_are_frozen():
    subparsers = argparse.ArgumentParser().add_subparsers()
    add_parser(subparsers)
    actions = [action for action in subparsers.choices["serve"]._actions if action.dest != "help"]
    assert [described(action) for action in actions] == FLAGS.strip().splitlines()
    assert all(action.help for action in actions)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "70000"], "'70000' must be a number from 0 to 65535"),
        (["--streams", "0"], "'0' must be a number of streams"),
        (["--size", "1280"], "'1280' must be a size in pixels"),
        (["--snapshot-every", "0"], "'0' must be a number of seconds"),
        (["--snapshot-every", "5"], "--snapshot-every needs --state"),
        (["--allow-files", "no/folder"], "there is no such folder"),
        (["--text-sink", "off"], "invalid int value: 'off'"),
        (["--fps", "2", "--chunk", "0.7"], "gives 1.4 frames a round"),
        (["--mode", "full"], "unrecognized arguments"),
        (["match.mp4"], "unrecognized arguments: match.mp4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag(capsys, arguments, told):
    try:
        code = cli.run(["serve", *arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert told in err and err.startswith("svlm: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "no/model"], "no/model is not a directory here"),
        (["--streams", "4096", "--vision-window", "1000"], "lower --vision-window"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
        (["--state", "/proc/none"], "--state"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(arguments, told):
    """Through serve.py, which serves where there is a --port."""
    command = [sys.executable, str(ROOT / "serve.py"), "--port=0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    error = done.stderr.strip().splitlines()
    assert done.returncode == 1 and done.stdout == ""
    assert len(error) == 1 and error[0].startswith("svlm: ") and told in error[0]
