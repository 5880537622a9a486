"""What an annotation file holds: a table, and plots where matplotlib is installed."""

import dataclasses
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from svlm_jax.data.annotations import AnnotationFile, UnusableRow
from svlm_jax.data.loader import Source
from svlm_jax.data.samples import SampleConfig, make_script
from svlm_jax.errors import UserError


@dataclasses.dataclass
class Statistics:
    """Of one file. Lists have an entry for each usable row."""

    rows: int = 0
    unusable: Counter[str] = dataclasses.field(default_factory=Counter)  # by reason
    seconds: list[float] = dataclasses.field(default_factory=list)
    words: list[int] = dataclasses.field(default_factory=list)
    previous: list[int] = dataclasses.field(default_factory=list)  # words said before the clip
    silent: list[float] = dataclasses.field(default_factory=list)  # share of turns without words
    turns: int = 0
    silent_turns: int = 0
    questions: int = 0
    words_left: int = 0  # that no turn says
    questions_left: int = 0
    videos: set[str] = dataclasses.field(default_factory=set)

    @property
    def usable(self) -> int:
        return len(self.seconds)


def survey(file: AnnotationFile, config: SampleConfig, max_seconds: float, videos: str | None = None) -> Statistics:
    """Reads every row. `videos`: also look whether each video is there, in this folder; none is opened."""
    found, source = Statistics(rows=len(file)), Source(file, videos or "")
    state: dict[str, str] = {}  # of each video looked for: what is wrong with it
    for row in range(len(file)):
        try:
            clip = file.annotation(row)
            script = make_script(clip, config)
            if clip.end - clip.start > max_seconds + 1e-6:
                raise UnusableRow("clip too long")
            path = source.path(clip.video)
            if videos is not None and "://" not in path:
                if path not in state:
                    state[path] = "video missing" if not os.path.isfile(path) else "" if os.path.getsize(path) else "video empty"
                if state[path]:
                    raise UnusableRow(state[path])
        except UnusableRow as error:
            found.unusable[error.reason] += 1
            continue
        silent = sum(not turn.words for turn in script.turns)
        found.videos.add(clip.video)
        found.seconds.append(clip.end - clip.start)
        found.words.append(len(clip.words))
        found.previous.append(len(clip.previous.split()))
        found.silent.append(silent / len(script.turns))
        found.turns += len(script.turns)
        found.silent_turns += silent
        found.questions += len(clip.questions)
        found.words_left += script.words_left
        found.questions_left += script.questions_left
    return found


def _spread(values: Sequence[float], digits: int = 0) -> str:
    return " / ".join(f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))


def table(found: Statistics) -> list[str]:
    """Lines of two columns. Spreads are least / median / most."""
    lines = [("rows", f"{found.rows:,}"), ("usable", f"{found.usable:,} ({found.usable / found.rows:.1%})")]
    lines += [(f"  {reason}", f"{count:,}") for reason, count in found.unusable.most_common()]
    if found.usable:
        total = sum(found.seconds)
        lines += [
            ("videos", f"{len(found.videos):,}"),
            ("hours of clips", f"{total / 3600:,.2f}"),
            ("seconds a clip", _spread(found.seconds, 1)),
            ("words", f"{sum(found.words):,}, {sum(found.words) / total:.2f} a second"),
            ("words a clip", _spread(found.words)),
            ("words before a clip", _spread(found.previous)),
            ("silent turns", f"{found.silent_turns / found.turns:.1%} of {found.turns:,}"),
            ("questions", f"{found.questions:,}"),
            ("never said", f"{found.words_left:,} words, {found.questions_left:,} questions"),
        ]
    width = max(len(name) for name, _ in lines) + 2
    return [f"{name:<{width}}{value}" for name, value in lines]


def plot(found: Statistics, title: str, path: Path) -> None:
    """Four histograms as a picture. Raises UserError where matplotlib is not installed, or there is nothing to draw."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib, or leave out --plots") from None
    if not found.usable:
        raise UserError(f"{title}: no row is usable, so there is nothing to plot")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    drawn = (("seconds a clip", found.seconds), ("words a clip", found.words), ("words before a clip", found.previous), ("silent share", found.silent))
    for axis, (name, values) in zip(axes.flat, drawn, strict=True):
        axis.hist(values, bins=40)
        axis.set(xlabel=name, ylabel="clips")
    figure.suptitle(f"{title}: {found.usable:,} of {found.rows:,} rows")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
