"""The picture of compare.py: quality against MoE FLOPs, quality against seconds, learning curves."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.catalogue import models


@dataclass(frozen=True)
class Run:
    """What one run's files say."""

    folder: Path
    about: dict[str, Any]  # run.json
    values: dict[str, float]  # by column
    curve: list[tuple[float, float]]  # updates, perplexity in validation

    @property
    def name(self) -> str:
        """Of the row, but for the preset: runs of one name differ in the seed alone."""
        return " ".join([self.about["model"], *self.about["flags"]])


Rows = Mapping[str, Sequence[Run]]


def styles_of(rows: Rows) -> dict[str, dict[str, Any]]:
    """A model with further flags has its colour, and a marker of its own that is not filled."""
    known, hollow = models(), cycle("^v<>phd*")
    styles: dict[str, dict[str, Any]] = {}
    for name, runs in rows.items():
        model = known[runs[0].about["model"]]
        styles[name] = {"color": model.colour, "marker": model.marker}
        if runs[0].about["flags"]:
            styles[name] |= {"marker": next(hollow), "markerfacecolor": "none"}
    return styles


def mean_and_bar(runs: Sequence[Run], column: str) -> tuple[float, float]:
    """Mean, and standard deviation: 0 of one run."""
    values = [run.values[column] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw(rows: Rows, costs: tuple[str, str], quality: str, path: Path) -> None:
    """
    Args:
        costs: the columns against which quality is shown.
        quality: the column that says how good a model is.
    """
    styles = styles_of(rows)
    figure, axes = plots.panels(1, 3, 15, 4.6)
    lower = " (lower is better)" if quality.endswith("ppl") else ""
    for panel, column in zip(axes, costs, strict=False):
        for name, runs in rows.items():
            (x, x_bar), (y, y_bar) = mean_and_bar(runs, column), mean_and_bar(runs, quality)
            bars: Any = {"linestyle": "none", "elinewidth": 1, "markersize": 8, "label": name}
            panel.errorbar(x, y, y_bar, x_bar, **bars, **styles[name])
        panel.set_xlabel(column)
        panel.set_ylabel(quality + lower)
        panel.margins(0.1)
        panel.set_xlim(left=0)
    for name, runs in rows.items():
        for curve in filter(None, (run.curve for run in runs)):  # none where validation was off
            axes[2].plot(*zip(*curve, strict=True), markersize=3, linewidth=1.3, **styles[name])
    axes[2].set_xlabel("updates")
    axes[2].set_ylabel("validation ppl (lower is better)")
    axes[2].set_yscale("log")
    columns = max(1, min(8, 130 // max(map(len, rows))))  # of names, which a picture is wide enough for
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False)
    plots.save(figure, path)
