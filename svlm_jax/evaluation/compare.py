"""What every comparison does: have each side's results made, in a folder of its own, then ask the judge about the pairs."""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svlm_jax.checkpoints.stream_settings import read_stream_settings
from svlm_jax.commands.eval_flags import stream_config
from svlm_jax.config import StreamConfig
from svlm_jax.errors import UserError
from svlm_jax.evaluation import cost
from svlm_jax.evaluation.contestants import Asking, Contestant, Showing, parse_contestant
from svlm_jax.evaluation.endpoint import Endpoint, parse_endpoint
from svlm_jax.evaluation.journal import Journal, Row, run_folder, write_whole
from svlm_jax.evaluation.judge import VERDICTS, Pair, Question, Votes, judge, requests_table
from svlm_jax.evaluation.watch import Record, Watch

TOLD_EVERY = 5.0  # seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """What a side has to do, apart from who it is."""

    watches: Sequence[Watch]
    config: StreamConfig
    showing: Showing  # what a server is shown
    record: Callable[[Record], Row]  # a row of results
    partial: bool  # whether a watch may have several rows
    streams: int
    save_every: int
    dtype: str | None
    mesh: dict[str, int] | None  # devices along each axis
    workers: int
    patience: Row  # timeout, tries and first_wait of an endpoint
    temperature: float | None  # a server's
    tokenizer: str | None  # the checkpoint whose tokens the history of a server is counted in; None: the tiny one


class Progress:
    """A line on standard error, now and then."""

    def __init__(self, words: str):
        self._words, self._told = words, -TOLD_EVERY

    def __call__(self, done: float, total: float) -> None:
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY or done == total:
            self._told = now
            print(f"{self._words}: {done:,} of {total:,}", file=sys.stderr, flush=True)


def digest(*parts: bytes | str) -> str:
    """Of texts and files' contents, to tell whether they changed."""
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(hashlib.blake2b(part.encode() if isinstance(part, str) else part).digest())
    return made.hexdigest()


def file_digest(path: Path) -> str:
    try:
        return digest(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None


def sides(args: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants that are given, by side."""
    given = {side: parse_contestant(text) for side, text in (("a", args.a), ("b", args.b)) if text}
    if len({each.name for each in given.values()}) < len(given):
        given = {side: dataclasses.replace(each, name=f"{each.name} ({side})") for side, each in given.items()}
    return given


def run_config(
    args: argparse.Namespace, given: Mapping[str, Contestant], who: Contestant | None, fixed: Mapping[str, Any] | None = None
) -> StreamConfig:
    """How a side is run: a checkpoint by its own `streaming.json` where the flags say nothing, a server as the checkpoint beside it.

    What is `fixed` goes before the checkpoint's own settings, but not before flags.
    """
    model = who.model if who is not None and who.model else next((each.model for each in given.values() if each.model), None)
    own = {} if model in (None, "demo") else _settings_of(str(model), must=not args.dry_run)
    return stream_config(args, {**own, **(fixed or {})})


def _settings_of(model: str, must: bool) -> dict[str, Any]:
    """Beside a checkpoint's weights. UserError where there `must` be a checkpoint and is none."""
    from svlm_jax.checkpoints.load import find

    if not must and not Path(model).expanduser().is_dir():  # an estimate downloads nothing
        return {}
    return read_stream_settings(find(model)[0])


def judge_endpoint(args: argparse.Namespace) -> Endpoint | None:
    return parse_endpoint(args.judge, **patience(args)) if args.judge else None


def patience(args: argparse.Namespace) -> Row:
    return {"timeout": args.timeout, "tries": args.tries, "first_wait": args.wait}


def read_prompt(path: str | None, default: str) -> str:
    if path is None:
        return default
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a text file") from None


def generate(who: Contestant, job: Job, folder: Path) -> list[tuple[str, Row]]:
    """The rows of a side's results, each with a name for messages, of whatever could be made. Raises UserError; rows made by then are kept."""
    settings = {
        "watches": digest(json.dumps([dataclasses.astuple(watch) for watch in job.watches])),
        "config": dataclasses.asdict(job.config),
        "who": who.model or (who.endpoint and f"{who.endpoint.model}"),
    }
    if who.endpoint:
        settings["showing"] = dataclasses.asdict(job.showing)
    else:
        settings |= {"streams": job.streams, "save_every": job.save_every, "dtype": job.dtype}
        settings |= {"mesh": job.mesh} if job.mesh else {}
    path = folder / "results.jsonl"
    with run_folder(folder, settings), Journal(path) as journal:
        if who.endpoint:
            _ask(who, job, journal)
        else:
            _watch(who, job, journal)
        return [(f"{path}, row {number}", row) for number, row in enumerate(journal.rows, 1)]


def refusals(rows: Sequence[tuple[str, Row]]) -> int:
    """How many requests a server refused; its results are empty there."""
    return sum(bool(row.get("asked", {}).get("refused")) for _, row in rows)


def _watch(who: Contestant, job: Job, journal: Journal) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own remarks on how long it compiles
    if who.model == "demo":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # so small a model is not worth a GPU's start
    from svlm_jax.api import load
    from svlm_jax.commands.device import mesh_of_flag
    from svlm_jax.demo.make_tiny import tiny_path
    from svlm_jax.evaluation.watching import Watching
    from svlm_jax.programs import use_compilation_cache

    use_compilation_cache()
    model = load(tiny_path() if who.model == "demo" else who.model, dtype=job.dtype, mesh=mesh_of_flag(job.mesh))
    work = Watching(
        model,
        job.watches,
        job.config,
        journal,
        job.record,
        streams=job.streams,
        every=job.save_every,
        partial=job.partial,
        told=Progress(f"{who.name}, rounds"),
    )
    work.run()


def _ask(who: Contestant, job: Job, journal: Journal) -> None:
    from svlm_jax.checkpoints.load import find
    from svlm_jax.data.samples import cut_words
    from svlm_jax.demo.make_tiny import tiny_path
    from svlm_jax.tokenizer import Tokenizer

    assert who.endpoint is not None
    tokenizer = Tokenizer.load(tiny_path() if job.tokenizer in (None, "demo") else find(str(job.tokenizer))[0])
    sink, sliding = job.config.text_sink, job.config.text_sliding

    def cut(text: str) -> str:
        """The first and the last tokens, as a checkpoint's settings keep them."""
        ids = tokenizer.encode_plain(text)
        if sink is None or sliding is None or len(cut_words(ids, sink, sliding)) == len(ids):
            return text
        return f"{tokenizer.decode(ids[:sink])} ... {tokenizer.decode(ids[len(ids) - sliding + 1 :])}".strip()

    work = Asking(
        dataclasses.replace(who.endpoint, **job.patience),
        job.watches,
        job.showing,
        journal,
        job.record,
        query=job.config.query,
        cut=cut,
        temperature=job.temperature,
        partial=job.partial,
        workers=job.workers,
        told=Progress(f"{who.name}, requests"),
    )
    work.run()


def vote(
    pairs: Sequence[Pair], endpoint: Endpoint, prompt: str, folder: Path, workers: int, price: tuple[float, float]
) -> dict[str, Votes]:
    """The judge's votes, from the folder's journal where they are known; what the others will cost is told before they are asked for.

    What the requests came to is written whatever happens.
    """

    def before(waiting: Sequence[Question]) -> None:
        weight = cost.weight(cost.weigh(waiting), price)
        print(f"{endpoint.model}: {len(waiting):,} questions to ask, about {weight}", file=sys.stderr, flush=True)

    with Journal(folder / VERDICTS) as journal:
        try:
            return judge(pairs, endpoint, journal, prompt=prompt, workers=workers, before=before, told=Progress(f"{endpoint.model}, questions"))
        finally:
            table = requests_table(journal.rows)
            write_whole(folder / "requests.json", (json.dumps(table) + "\n").encode())
            if told := ", ".join(
                f"{count:,} {kind}" for kind, count in table.items() if not kind.endswith("_tokens") and kind != "verdict"
            ):
                print(f"{endpoint.model}: answers without a verdict and failures, all runs together: {told}", file=sys.stderr, flush=True)


def described(given: dict[str, Contestant]) -> dict[str, Any]:
    """The sides as the report has them."""
    kinds = {side: "checkpoint" if each.model else "results" if each.results else "endpoint" for side, each in given.items()}
    return {side: {"name": each.name, "kind": kinds[side]} for side, each in given.items()}
