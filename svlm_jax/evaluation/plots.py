"""The measures over stream time, drawn."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from svlm_jax.errors import UserError
from svlm_jax.evaluation.journal import Row
from svlm_jax.evaluation.report import COLUMNS


def check(path: Path) -> None:
    """Raises UserError where nothing can be drawn there, which is better known before hours of work than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install matplotlib, or leave out --plots")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place for --plots") from None


def plot(title: str, sides: Mapping[str, tuple[str, Sequence[Row]]], path: Path) -> None:
    """One panel a measure, one line a contestant, over the parts of the stream, into a file that passes `check`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (column, label, share) in zip(axes.flat, COLUMNS, strict=True):
        for name, parts in sides.values():
            points = [((i + 0.5) / len(parts) * 100, part[column]) for i, part in enumerate(parts) if part[column] is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)
        axis.set(xlabel="% of the stream", ylabel=label, xlim=(0, 100))
        if share:
            axis.set_ylim(-0.02, 1.02)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axis.axhline(0, color="0.8", zorder=0)
    figure.suptitle(title)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
