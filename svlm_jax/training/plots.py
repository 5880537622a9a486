"""A run's course as a picture, drawn from its file of JSON lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def plot(metrics: Path, picture: Path) -> bool:
    """Draws loss, learning rate, speed, waiting for data and evaluation by step. Whether it could: matplotlib may not be installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not records:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    spent = records[-1]["spent"]
    curves = {
        "loss (nats a label)": {"training": "loss", "held out": "eval_loss", "unigram": "eval_unigram_loss"},
        "accuracy": {
            "training": "accuracy",
            "held out": "eval_accuracy",
            "silent turns": "eval_silence_accuracy",
            "spoken turns": "eval_speech_accuracy",
        },
        "learning rate": {"": "learning_rate"},
        "tokens a second": {"": "tokens_per_second"},
        "share of a step waiting for data": {"": "data_wait"},
    }
    for axis, (title, lines) in zip(axes.flat, curves.items(), strict=False):
        for label, key in lines.items():
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if key.startswith("eval_") else None, linewidth=1)
        axis.set(xlabel="step", ylabel=title)
        if any(lines) and axis.lines:
            axis.legend()
    _bars(axes.flat[-1], {kind.replace("_", " "): seconds for kind, seconds in spent.items()})
    figure.suptitle(f"{metrics.parent.name}: step {records[-1]['step']}, goodput {records[-1]['goodput']:.1%}")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return True


def _bars(axis: Any, values: dict[str, float]) -> None:
    draw: Callable[..., Any] = axis.barh
    draw(list(values), list(values.values()))
    axis.set(xlabel="seconds of wall time")
