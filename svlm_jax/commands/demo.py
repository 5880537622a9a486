"""`svlm demo match`: makes matches whose truth is known, as video and annotations."""

import argparse
import sys
from pathlib import Path
from typing import Any

from svlm_jax.commands import UsageError

SUMMARY = "make a simulated match: a video, and what really happens in it"
DESCRIPTION = """\
Makes a ball game seen from above, of any length: a video in H.264, and beside it the commentary of one who sees everything, in the format of training
data. One seed is one match; seeds from 1000 on are for training.
Example: svlm demo match --minutes 120 --seed 7 --out match.mp4
"""


def add_parser(subparsers: Any) -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("demo", help=SUMMARY, description=DESCRIPTION, formatter_class=shape, allow_abbrev=False)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    made = subjects.add_parser("match", help=SUMMARY, description=DESCRIPTION, formatter_class=shape, allow_abbrev=False)
    made.add_argument("--minutes", metavar="M", type=float, default=2.0, help="how long (default: 2)")
    made.add_argument("--seed", metavar="N", type=int, default=0, help="which match (default: 0)")
    made.add_argument("--out", metavar="FILE.mp4", required=True, help="the video; FILE.jsonl beside it has what happens")
    made.add_argument("--fps", metavar="RATE", type=int, default=12, help="pictures a second (default: 12)")
    made.add_argument("--size", metavar="WxH", type=_size, default=(336, 224), help="pixels (default: 336x224, on which models are trained)")
    made.add_argument("--quality", metavar="CRF", type=int, default=26, help="x264's constant rate factor, less is better (default: 26)")
    every = "also ask the commentator a question every so many seconds (default: 0, never)"
    made.add_argument("--question-every", metavar="SECONDS", type=float, default=0.0, help=every)


def run(args: argparse.Namespace) -> int:
    from svlm_jax.commands.progress import Countdown
    from svlm_jax.demo.commentary import commentate, random_questions
    from svlm_jax.demo.film import FilmConfig, annotate, write_annotations, write_video
    from svlm_jax.demo.match import simulate

    out = Path(args.out)
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"--out {args.out}: the name must end in .mp4")
    if not 0 < args.minutes <= 7 * 24 * 60:
        raise UsageError(f"--minutes must be more than 0 and at most a week, not {args.minutes:g}")
    if not 0 <= args.seed < 2**32 or args.question_every < 0:
        raise UsageError("--seed must be from 0 to 4294967295, and --question-every not negative")
    if not out.parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no folder {out.parent}")
    seconds = float(round(60 * args.minutes)) or 1.0
    film = FilmConfig(fps=args.fps, width=args.size[0], height=args.size[1], quality=args.quality)
    match = simulate(args.seed, seconds)
    questions = random_questions(match, args.question_every) if args.question_every else {}
    with Countdown(f"filming {out.name}") as progress:
        write_video(match, out, film, progress)
    write_annotations([annotate(out.name, seconds, commentate(match, questions))], out.with_suffix(".jsonl"))
    size = out.stat().st_size / 1e6
    print(f"{out}: {seconds / 60:g} minutes, {size:.1f} MB; what happens in it: {out.with_suffix('.jsonl')}", file=sys.stderr)
    return 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT, such as 672x448")
    return int(width), int(height)
