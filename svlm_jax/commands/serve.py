"""`svlm serve`, and serve.py with --port: live video over HTTP and WebSockets."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from svlm_jax.commands import UsageError
from svlm_jax.commands.device import check_device, mesh_of_flag
from svlm_jax.commands.flags import add_engine_arguments, stream_settings
from svlm_jax.errors import UserError

SUMMARY = "comment on many live videos, over HTTP and WebSockets, with a page to watch them"
EPILOG = """\
A key for clients comes from --api-key or SVLM_API_KEYS (several, with commas between them); without one, everybody who reaches the
port may use it. Without --allow-files and --allow-host clients can push frames and start the bundled clip, and nothing else is opened.

exit codes:
  0    stopped by SIGTERM or Ctrl-C: streams were told, and saved where there is a --state
  1    something went wrong: a port in use, a model that cannot be loaded, a device that failed
  2    a flag is wrong; nothing was done
  130, 143  stopped by a second signal, at once

Every event of a stream is a line of JSON on standard output. More: docs/operate.md."""
KEYS = "SVLM_API_KEYS"
NEEDED = ("starlette", "uvicorn", "websockets", "prometheus_client")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help=SUMMARY,
        description="Comments on many live videos at once. Without arguments: with the bundled model, on the CPU, for this machine alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--port", metavar="P", type=_port, default=8000, help="to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--streams", metavar="N", type=_count, default=4, help="places: streams that run at once (default: 4)")
    size = "of all streams before --max-pixels, such as 1280x720; other shapes get black sides (default: 1280x720; the bundled model: 336x224)"
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", type=_size, help=size)
    access = parser.add_argument_group("access")
    access.add_argument("--api-key", metavar="KEY", action="append", default=[], help="that clients must send; repeatable")
    folder = "clients may name files below this folder; repeatable"
    access.add_argument("--allow-files", metavar="FOLDER", type=Path, action="append", default=[], help=folder)
    host = "clients may name URLs of this host (NAME, *.NAME or an address, :PORT if only that one); repeatable"
    access.add_argument("--allow-host", metavar="HOST", action="append", default=[], help=host)
    keep = parser.add_argument_group("keeping")
    keep.add_argument("--state", metavar="FOLDER", type=Path, help="snapshots of streams are kept here, and streams go on from them")
    often = "seconds between snapshots of every stream (default: only when asked, and at the end)"
    keep.add_argument("--snapshot-every", metavar="SECONDS", type=_seconds, help=often)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    settings = stream_settings(args)
    if args.snapshot_every and not args.state:
        raise UsageError("--snapshot-every needs --state, the folder that it writes to")
    for folder in args.allow_files:
        if not folder.is_dir():
            raise UsageError(f"--allow-files {folder}: there is no such folder")
    copies = args.mesh["data"] if args.mesh else 1
    if args.streams % copies:
        raise UsageError(f"--streams {args.streams} does not divide by data={copies} of --mesh: make it a multiple of {copies}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed, which a server needs: pip install 'svlm-jax[serve]'")
    keys = (*args.api_key, *(key.strip() for key in os.environ.get(KEYS, "").split(",")))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.model is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # so small a model is not worth a GPU's start

    from svlm_jax.checkpoints.load import find
    from svlm_jax.checkpoints.run_form import described_in
    from svlm_jax.checkpoints.stream_settings import read_stream_settings
    from svlm_jax.config import StreamConfig
    from svlm_jax.demo.bundle import model_path
    from svlm_jax.programs import use_compilation_cache
    from svlm_jax.serving.origins import Allowed
    from svlm_jax.serving.server import listen, serve
    from svlm_jax.serving.service import ServeConfig, Service

    use_compilation_cache(not args.no_compilation_cache)
    check_device()
    mesh = mesh_of_flag(args.mesh)
    bound = listen(args.host, args.port)
    config = ServeConfig(
        stream=StreamConfig(**{**read_stream_settings(described_in(find(args.model or model_path())[0])), **settings}),
        model=args.model,
        weights=args.weights,
        dtype=args.dtype,
        quantize=args.quantize,
        mesh=mesh,
        places=args.streams,
        size=args.size,
        allowed=Allowed(tuple(args.allow_files), tuple(args.allow_host)),
        state=args.state,
        snapshot_seconds=args.snapshot_every,
        keys=tuple(key for key in keys if key),
    )
    with bound:
        return serve(Service(config), bound, args.host)


# Values of flags


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of streams, at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """(height, width) in pixels."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size in pixels, such as 1280x720")
    return int(height), int(width)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, at least 1")
    return value
