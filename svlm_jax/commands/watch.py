"""`svlm watch`: a stream of a server that runs elsewhere, on the terminal and in caption files."""

import argparse
import os
from typing import Any

from svlm_jax.captions import Caption, clock, open_caption_files
from svlm_jax.commands import UsageError
from svlm_jax.commands.flags import _out
from svlm_jax.errors import UserError
from svlm_jax.terminal import printable

SUMMARY = "watch a stream of a server: its words as they come"
EPILOG = """\
Example: svlm watch http://127.0.0.1:8000 --source rtsp://camera.example/stream --out camera.vtt
The key is in SVLM_API_KEY. Ctrl-C ends a stream that this command has started, and leaves one that it has joined.

exit codes:
  0    the stream came to its end
  1    it failed, or the server refused or went away
  2    a flag is wrong; nothing was done
  130  stopped by Ctrl-C      143  stopped by SIGTERM"""
KEY = "SVLM_API_KEY"


def add_parser(subparsers: Any) -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "watch", help=SUMMARY, description=f"{SUMMARY.capitalize()}.", epilog=EPILOG, formatter_class=shape, allow_abbrev=False
    )
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    source = "what the server is to show: sample, a file of its own, or a URL (default: sample)"
    parser.add_argument("--source", metavar="WHAT", help=source)
    parser.add_argument("--stream", metavar="ID", help="one that runs already, instead of a new one; it is told from its beginning")
    parser.add_argument("--query", metavar="TEXT", help="what the model is asked to do (default: the server's)")
    parser.add_argument("--pace", choices=("fast", "real"), default="real", help="of a file (default: real)")
    parser.add_argument("--ask", metavar="TEXT", action="append", default=[], help="a question for the next round; repeatable")
    out = "also write the captions to a .vtt, .srt or .jsonl file; repeatable"
    parser.add_argument("--out", metavar="FILE", type=_out, action="append", default=[], help=out)


def run(args: argparse.Namespace) -> int:
    if args.stream and (args.source or args.query):
        raise UsageError("--stream joins one that runs already: --source and --query are of a new one")
    from svlm_jax.serving.client import Client

    client, files = Client(args.url, os.environ.get(KEY, "")), open_caption_files(args.out)
    wish = {"query": args.query} if args.query is not None else {}
    id = args.stream or client.start(args.source or "sample", pace=args.pace, **wish)
    ended = False
    try:
        for text in args.ask:
            client.ask(id, text)
        with files:
            files.start()
            for event in client.events(id):
                ended = event["type"] == "end"
                if event["type"] in ("segment", "silence"):
                    files.write(Caption(event["start"], event["end"], event.get("text", "")))
                if line := told(event):
                    print(printable(line), flush=True)
                if ended and event["reason"] == "error":
                    raise UserError(f"stream {id} failed: {event['message']}")
    finally:
        if not ended and not args.stream:
            client.end(id)
    return 0


def told(event: dict[str, Any]) -> str:
    """A line of an event; none for silence."""
    kind = event["type"]
    if kind == "silence":
        return ""
    if kind == "gap" and "start" in event:
        return f"{clock(event['start'])} ({event['end'] - event['start']:g} s were skipped: {event['reason']})"
    words = {
        "segment": lambda: event["text"],
        "question": lambda: f"(asked: {event['text']})",
        "gap": lambda: f"({event['events']} earlier events are no longer kept)",
        "state": lambda: f"({event['state']}{': ' if event.get('message') else ''}{event.get('message', '')})",
        "end": lambda: f"(the end: {event['message'] or event['reason']})",
    }
    line = words[kind]() if kind in words else ""
    return f"{clock(event['start'])} {line}" if line and "start" in event else line
