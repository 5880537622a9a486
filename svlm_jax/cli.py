"""The command line, `svlm COMMAND`: from arguments to an exit code, whatever happens in between."""

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from svlm_jax.commands import UsageError
from svlm_jax.errors import UserError

COMMANDS = {  # each a module of svlm_jax.commands, imported only when it is called
    "caption": "comment on a video, on the terminal and in caption files",
    "serve": "comment on many live videos, over HTTP and WebSockets, with a page to watch them",
    "watch": "watch a stream of a server: its words as they come",
    "bench": "measure how fast this device is",
    "eval": "compare commentaries on benchmarks: generate, merge, judge, report",
    "plan": "say what a run takes of TPUs or GPUs that are not here",
    "data": "look at training data and prepare it",
    "demo": "make a simulated match: a video, and what really happens in it",
    "convert": "convert a checkpoint: Hugging Face to Orbax and back, or to another dtype",
    "inspect": "say what a checkpoint is: family, sizes, dtypes, files",
    "check": "check a checkpoint, by itself or against another",
}
INTERRUPTED, READER_LEFT, TERMINATED = 130, 141, 143  # 128 + the number of the signal, as shells have it


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"svlm: {message} (--help lists the flags)\n")


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of `svlm`; only the flags of `command` are filled in."""
    parser = Parser(prog="svlm", description="A model that comments on video without end.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if importlib.util.find_spec(f"svlm_jax.commands.{name}") is None:
            continue
        if name == command:
            importlib.import_module(f"svlm_jax.commands.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def run(argv: Sequence[str]) -> int:
    """`svlm ARGV`, as an exit code. SystemExit from help and from flags that cannot be parsed."""
    command = next((word for word in argv if not word.startswith("-")), None)
    args = make_parser(command).parse_args(argv)
    return guarded(importlib.import_module(f"svlm_jax.commands.{args.command}").run, args)


def guarded(work: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """The exit code of `work`; what the user can mend, and what the user did, is told in one line."""
    try:
        return work(args) or 0
    except UserError as error:
        _tell(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        return READER_LEFT
    except KeyboardInterrupt as stop:
        _tell(str(stop) or "stopped")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _tell(message: str) -> None:
    try:
        sys.stderr.write(f"svlm: {' '.join(message.split())}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The program."""
    _hear_signals()
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # help, too, may be piped into head
        code = READER_LEFT
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code in (INTERRUPTED, READER_LEFT, TERMINATED):
        os._exit(code)  # a compiler or a device may be at work in a thread, and Python would wait for it; all files are closed
    sys.exit(code)


def _hear_signals() -> None:
    """The first Ctrl-C or SIGTERM is raised where the program stands; a second one ends it on the spot."""

    def stop(number: int, frame: object) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup and background jobs are left alone
            signal.signal(each, stop)


if __name__ == "__main__":
    main()
