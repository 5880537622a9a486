"""`svlm data`: looks at annotation files and prepares them. The work is in `svlm_jax.data`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svlm_jax.errors import UserError
from svlm_jax.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from svlm_jax.config import VisionConfig
    from svlm_jax.data.annotations import Annotation
    from svlm_jax.data.samples import Sample, SampleConfig

SUMMARY = "look at training data and prepare it"
DESCRIPTION = """\
Looks at annotation files (a JSON list of two messages a line, as LiveCC and StreamingVLM publish them) and prepares them.
Example: svlm data chunk matches.jsonl --window 24 --overlap 12 --out chunks.jsonl && svlm data stats chunks.jsonl --videos videos
"""


def add_parser(subparsers: Any) -> None:
    """`data` with its subjects."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("data", help=SUMMARY, description=DESCRIPTION, formatter_class=shape, allow_abbrev=False)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")

    def subject(name: str, text: str, *, many: bool = True) -> argparse.ArgumentParser:
        made = subjects.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        made.add_argument("files" if many else "file", nargs="+" if many else None, metavar="FILE", help="an annotation file")
        return made

    def sample(made: argparse.ArgumentParser) -> None:
        made.add_argument("--layout", choices=("published", "streaming"), default="published", help="of tokens (default: published)")
        made.add_argument("--fps", metavar="RATE", type=float, default=2.0, help="frames a second (default: 2)")
        made.add_argument("--text-sink", metavar="TOKENS", type=int, default=512, help="first tokens of the previous text (default: 512)")
        made.add_argument("--text-sliding", metavar="TOKENS", type=int, default=512, help="last tokens of it (default: 512)")

    subject("index", "find the rows of files and keep their places beside them")

    stats = subject("stats", "count rows, words and silence, and rows that cannot be used")
    stats.add_argument("--videos", metavar="DIR", help="also look whether each video is in this folder")
    sample(stats)
    stats.add_argument("--model", metavar="DIR", help="also count tokens a row, with this directory's tokenizer and sizes")
    stats.add_argument("--frame", metavar="WxH", type=_size, default=(560, 1008), help="pixels of the frames then (default: 1008x560)")
    stats.add_argument("--max-seconds", metavar="S", type=float, default=64.0, help="longer clips count as unusable (default: 64)")
    stats.add_argument("--plots", metavar="DIR", help="also draw histograms into this folder (needs matplotlib)")

    show = subject("show", "write one sample as a page of HTML: frames, turns, tokens and labels", many=False)
    show.add_argument("--row", metavar="N", type=int, default=0, help="counted from 0 (default: 0)")
    show.add_argument("--out", metavar="FILE", required=True, help="the page")
    show.add_argument("--videos", metavar="DIR", default="", help="folder that the paths of videos are relative to")
    show.add_argument("--model", metavar="DIR", help="directory whose tokenizer and sizes are used (default: those of the tiny model)")
    show.add_argument("--max-pixels", metavar="N", type=int, default=602_112, help="of a frame (default: 602112)")
    sample(show)

    chunk = subject("chunk", "cut long annotated videos into chunks that overlap")
    chunk.add_argument("--window", metavar="S", type=float, default=24.0, help="seconds a chunk (default: 24)")
    chunk.add_argument("--overlap", metavar="S", type=float, default=12.0, help="seconds it shares with the next (default: 12)")
    kept = "keep but the first and the last N words of what was said before: no less than the tokens that rows keep (default: all words)"
    chunk.add_argument("--previous-words", metavar="N", type=int, help=kept)
    chunk.add_argument("--out", metavar="FILE", required=True, help="the new annotation file")

    convert = subject("convert", "write the usable rows into one ArrayRecord file")
    convert.add_argument("--out", metavar="FILE", required=True, help="must end in .array_record")


def _size(text: str) -> tuple[int, int]:
    """WxH in pixels, as (height, width)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers, such as 1008x560")
    return int(height), int(width)


def run(args: argparse.Namespace) -> int:
    return {"index": _index, "stats": _stats, "show": _show, "chunk": _chunk, "convert": _convert}[args.subject](args)


def _index(args: argparse.Namespace) -> int:
    from svlm_jax.data.annotations import INDEX_SUFFIX, AnnotationFile

    for path in args.files:
        file = AnnotationFile(path)
        doubled = len(file) - len(set(file.index.twins.tolist()))
        kept = Path(path + INDEX_SUFFIX).is_file()
        where = f"kept in {path}{INDEX_SUFFIX}" if kept else "not kept, as the folder cannot be written to"
        print(f"{path}: {len(file):,} rows, {doubled:,} of them doubled; the index is {where}")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from svlm_jax.data.annotations import AnnotationFile
    from svlm_jax.data.statistics import plot, survey, table

    config, write = _sample_config(args), None
    if args.model:
        write = _writer(config, args.model, args.frame)
    for path in args.files:
        found = survey(AnnotationFile(path), config, args.max_seconds, args.videos, write)
        print(path, *(f"  {line}" for line in table(found)), sep="\n")
        if args.plots:
            Path(args.plots).mkdir(parents=True, exist_ok=True)
            picture = Path(args.plots, f"{Path(path).stem}.png")
            plot(found, Path(path).name, picture)
            print(f"  plots are in {picture}")
    return 0


def _sample_config(args: argparse.Namespace) -> "SampleConfig":
    from svlm_jax.data.samples import SampleConfig

    return SampleConfig(args.layout, args.fps, args.text_sink, args.text_sliding)


def _writer(config: "SampleConfig", model: str, frame_hw: tuple[int, int]) -> "Callable[[Annotation], Sample]":
    """Lays rows out without opening their videos."""
    from svlm_jax.data.samples import lay_out
    from svlm_jax.streaming.prompt import PromptLayout
    from svlm_jax.tokenizer import Tokenizer

    tokenizer, vision = Tokenizer.load(model), _vision(model)
    layout = PromptLayout.from_tokenizer(tokenizer)
    return lambda clip: lay_out(clip, config, frame_hw, tokenizer, layout, vision)


def _vision(model: str) -> "VisionConfig":
    """The vision tower of a directory's config.json; of one that has a tokenizer alone Qwen2.5-VL's."""
    from svlm_jax.checkpoints.hub_config import read_config
    from svlm_jax.checkpoints.run_form import described_in
    from svlm_jax.configs.models import qwen2_5_vl_7b
    from svlm_jax.storage import at

    folder = at(model)
    return read_config(folder).vision if (described_in(folder) / "config.json").is_file() else qwen2_5_vl_7b().vision


def _show(args: argparse.Namespace) -> int:
    from svlm_jax.data.annotations import AnnotationFile
    from svlm_jax.data.loader import FrameCache, LoaderConfig, Source, read_clip
    from svlm_jax.data.samples import lay_out, make_script
    from svlm_jax.data.show import page, write_page
    from svlm_jax.demo.make_tiny import tiny_path
    from svlm_jax.streaming.prompt import PromptLayout
    from svlm_jax.tokenizer import Tokenizer

    source = Source(AnnotationFile(args.file), args.videos)
    if not 0 <= args.row < len(source.rows):
        raise UserError(f"{args.file} has rows 0 to {len(source.rows) - 1}, and no row {args.row}")
    config, tokenizer = LoaderConfig(_sample_config(args), max_pixels=args.max_pixels), Tokenizer.load(args.model or tiny_path())
    clip, vision = source.annotation(args.row), _vision(args.model or str(tiny_path()))
    frames = read_clip(source.path(clip.video), clip, config, FrameCache(0), factor=vision.merged_patch_size)
    height, width = frames[0].shape[1:3]
    sample = lay_out(clip, config.sample, (height, width), tokenizer, PromptLayout.from_tokenizer(tokenizer), vision)
    name = f"{Path(args.file).name}, row {args.row}, {args.layout}"
    write_page(Path(args.out), page(name, clip, make_script(clip, config.sample), sample, frames, tokenizer))
    print(f"{args.out}: {len(sample.tokens):,} tokens, {int((sample.labels >= 0).sum()):,} of them labels")
    return 0


def _chunk(args: argparse.Namespace) -> int:
    from svlm_jax.data.annotations import AnnotationFile, UnusableRow, annotation_row
    from svlm_jax.data.chunks import ChunkConfig, make_chunks

    config, files = ChunkConfig(args.window, args.overlap, previous_words=args.previous_words), [AnnotationFile(path) for path in args.files]
    target, chunks, left_out = Path(args.out), 0, 0
    if any(target.exists() and target.samefile(file.path) for file in files):
        raise UserError(f"{target} is one of the files to be cut: choose another name for --out")
    with whole_file(target) as draft, draft.open("w", encoding="utf-8", errors="surrogatepass") as out:
        for file in files:
            for row in range(len(file)):
                try:
                    cut = list(make_chunks(file.annotation(row), config))
                except UnusableRow as error:
                    print(f"{file.path}, row {row} is left out: {error}")
                    left_out += 1
                    continue
                out.writelines(json.dumps(annotation_row(chunk), ensure_ascii=False) + "\n" for chunk in cut)
                chunks += len(cut)
    rows = sum(map(len, files))
    print(f"{target}: {chunks:,} chunks of {args.window:g} s that share {args.overlap:g} s, of {rows - left_out:,} clips; {left_out:,} left out")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from svlm_jax.data.annotations import AnnotationFile
    from svlm_jax.data.records import convert

    written, left_out = convert([AnnotationFile(path) for path in args.files], args.out)
    reasons = "".join(f"; {count:,} left out: {reason}" for reason, count in left_out.most_common())
    print(f"{args.out}: {written:,} rows{reasons}")
    return 0
