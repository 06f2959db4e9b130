"""The picture of compare.py: quality against MoE FLOPs, and against seconds."""

import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.catalogue import models
from experiments.runs import (
    FFN_SECONDS,
    FLOPS,
    MS_DECODING,
    MS_SENTENCE,
    MS_UPDATE,
    TRAINING_SECONDS,
    Rows,
    Run,
    known,
)


def styles_of(rows: Rows) -> dict[str, dict[str, Any]]:
    """A model with further flags has its colour, a hollow marker of its own, and a broken line."""
    hollow, broken = cycle("^v<>phd*"), cycle(["--", ":", "-."])
    styles: dict[str, dict[str, Any]] = {}
    for name, runs in rows.items():
        model = models()[runs[0].about["model"]]
        styles[name] = {"color": model.colour, "marker": model.marker}
        if runs[0].about["flags"]:
            styles[name] |= {"marker": next(hollow), "markerfacecolor": "none", "linestyle": next(broken)}
    return styles


def mean_and_bar(runs: Sequence[Run], column: str) -> tuple[float, float]:
    """Mean, and standard deviation: 0 of one run."""
    values = known(runs, column)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def costs_of(rows: Rows) -> list[str]:
    """The columns against which quality is shown."""
    runs = [run for members in rows.values() for run in members]
    measured = [name for name in (MS_UPDATE, MS_DECODING, MS_SENTENCE, FFN_SECONDS) if known(runs, name)]
    return [FLOPS, *(measured or [TRAINING_SECONDS] * bool(known(runs, TRAINING_SECONDS)))]


def draw(rows: Rows, quality: str, path: Path) -> None:
    """
    Args:
        quality: the column that says how good a model is.
    """
    styles, costs = styles_of(rows), costs_of(rows)
    figure, axes = plots.panels(1, len(costs), 6.4 * len(costs), 5.2, sharey=True)
    axes[0].set_ylabel(quality + " (lower is better)" * quality.endswith("ppl"))
    for panel, column in zip(axes, costs, strict=True):
        points = []
        for name, runs in rows.items():
            if known(runs, column):
                (x, x_bar), (y, y_bar) = mean_and_bar(runs, column), mean_and_bar(runs, quality)
                bars: Any = {"elinewidth": 0.8, "markersize": 6} | styles[name] | {"linestyle": "none"}
                panel.errorbar(x, y, y_bar, x_bar, **bars)
                points.append((x, y, plots.short(name), styles[name]["color"]))
        panel.set_xlabel(column)
        panel.margins(0.15)
        plots.label_points(panel, points)
    plots.save(figure, path)
