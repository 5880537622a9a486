"""`svlm caption`, and serve.py: a video in, words on the terminal and in caption files out."""

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from svlm_jax.captions import clock, open_caption_files
from svlm_jax.commands.device import check_device, mesh_of_flag
from svlm_jax.commands.flags import add_arguments, stream_settings
from svlm_jax.errors import UserError
from svlm_jax.terminal import LiveView

SUMMARY = "comment on a video, on the terminal and in caption files"
DESCRIPTION = "Comments on a video as it plays. Without arguments: the bundled clip, with the bundled model, on the CPU."
EPILOG = """\
exit codes:
  0    the video was captioned to its end
  1    something went wrong, or the video is damaged; what was said before is kept
  2    a flag is wrong; nothing was done
  130  stopped by Ctrl-C      143  stopped by SIGTERM: what was said before is kept
  141  whoever read the output left

Compiled programs are kept in ~/.cache/svlm-jax (XDG_CACHE_HOME and JAX_COMPILATION_CACHE_DIR move them).
JAX_PLATFORMS=cpu, cuda or tpu chooses the device."""

if TYPE_CHECKING:
    from svlm_jax.api import Commentary, Said
    from svlm_jax.commands.truth import Truth

Result = TypeVar("Result")
PATIENCE = 1.0  # seconds that a round may take before the view says that it goes on


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "caption",
        help=SUMMARY,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    settings = stream_settings(args)
    files = open_caption_files(args.out)  # looks whether they can be written; changes none yet
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own remarks on how long it compiles
    if args.model is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # so small a model is not worth a GPU's start
    position = args.start
    with LiveView() as view, files:
        aside = _Aside(view)
        try:
            commentary = aside("starting JAX", lambda: _open(args, settings))
            truth = None if args.truth is None else _truth(commentary, args.truth)
            view.total_seconds, view.model_line = commentary.end, _describe(commentary)
            _say_what_to_expect(view, args, commentary)
            aside(_loading(commentary), commentary.load)
            aside("compiling", commentary.prepare)
            files.start()
            broken = 0
            for said in _rounds(commentary, aside, view):
                files.write(said.caption)
                position = said.caption.end if commentary.end is None else min(said.caption.end, commentary.end)
                really = truth.said(said.caption.start, said.caption.end) if truth else ""
                view.update(said.caption, position, said.speed, said.cache_fill, really)
                broken += said.broken
            if broken:
                view.note(f"{broken} damaged pieces of the video were skipped")
            if args.out:
                view.note(f"captions are in {', '.join(args.out)}")
        except KeyboardInterrupt as stop:
            kept = f"; what was said is in {', '.join(args.out)}" if args.out and position > args.start else ""
            raise type(stop)(f"stopped at {clock(position)}{kept}") from None
        except Exception as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError("the memory is full: lower --vision-window, --text-window or --max-pixels, or use a smaller model") from error
        finally:
            aside.close()
    return 0


def _open(args: argparse.Namespace, settings: dict[str, Any]) -> "Commentary":
    """Checks video, model and memory; reads nothing large."""
    from svlm_jax.api import Commentary
    from svlm_jax.demo.bundle import clip_path
    from svlm_jax.programs import use_compilation_cache

    use_compilation_cache(not args.no_compilation_cache)
    check_device()
    return Commentary(
        clip_path() if args.source is None else args.source,
        args.model,
        weights=args.weights,
        dtype=args.dtype,
        quantize=args.quantize,
        mesh=mesh_of_flag(args.mesh),
        start=args.start,
        duration=args.duration,
        questions=[(when, text) for text, when in args.questions],
        **settings,
    )


def _truth(commentary: "Commentary", path: str) -> "Truth":
    from svlm_jax.commands.truth import Truth

    return Truth.beside(commentary.source, path)


def _describe(commentary: "Commentary") -> str:
    """What runs, in a line."""
    import jax

    spec, s = commentary.spec, commentary.spec.stream
    memory = f"windows of {s.vision_window} rounds of video and {s.text_window} of text"
    if s.mode == "windows":
        memory = f"{s.vision_window} rounds at a time"
    elif s.mode == "full":
        memory = f"room for {s.capacity_rounds} rounds"
    seen = f"{spec.width}x{spec.height} pixels at {s.fps:g} fps, {spec.clip_pads.sum()} tokens a round"
    kind = commentary.checkpoint.quantization.kind if commentary.checkpoint and commentary.checkpoint.quantization else None
    precision = f"{commentary.dtype} with {kind} weights" if kind else f"{commentary.dtype}"
    precision += f", keys and values in {s.kv}" if s.kv else ""
    where = f"{spec.model.name} in {precision} on {jax.devices()[0].device_kind}"
    return f"{Path(commentary.source).name}: {seen}; {s.mode}, {memory}; {where}"


def _say_what_to_expect(view: LiveView, args: argparse.Namespace, commentary: "Commentary") -> None:
    from svlm_jax.api import random_weights

    if random_weights(commentary.path) and not args.weights:
        view.note(f"The model {commentary.path.name} has random weights, so its words mean nothing: --model DIR takes one that has learnt.")
    if args.model is None and args.source is not None and not args.weights:
        view.note("The bundled model knows nothing but matches of `svlm demo match`: --model DIR takes one that knows other videos.")
    copies = 1 if commentary.mesh is None else commentary.mesh.shape["data"]
    if copies > 1:
        view.note(f"A video is one stream, which data={copies} cannot split: those devices all do the same work.")


def _loading(commentary: "Commentary") -> str:
    from svlm_jax.programs import size_text

    size = f" ({size_text(commentary.checkpoint.nbytes)})" if commentary.checkpoint else ""
    return f"loading {commentary.spec.model.name}{size}"


def _rounds(commentary: "Commentary", aside: "_Aside", view: LiveView) -> Iterator["Said"]:
    """Each round as it comes; the view hears of one that takes long."""
    rounds = iter(commentary)
    while True:
        said = aside.patiently("captioning the next round", lambda: next(rounds, None))
        if said is None:
            return
        yield said


class _Aside:
    """Runs what is slow in a thread, so that Ctrl-C is heard at once, and has the view say that it goes on.

    A compiler or a device can't be interrupted: after Ctrl-C the thread is left to itself (`svlm_jax.cli.main` ends the process).
    """

    def __init__(self, view: LiveView):
        self._view, self._thread = view, ThreadPoolExecutor(1, "aside")

    def __call__(self, text: str, work: Callable[[], Result]) -> Result:
        with self._view.busy(text):
            return self._thread.submit(work).result()

    def patiently(self, text: str, work: Callable[[], Result]) -> Result:
        """For work that is quick as a rule."""
        future, waited = self._thread.submit(work), 0.0
        while True:
            try:
                return future.result(PATIENCE)
            except TimeoutError:
                if future.done():  # or it is the work's own
                    raise
                waited += PATIENCE
                self._view.status(f"{text}, {waited:.0f} s")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
