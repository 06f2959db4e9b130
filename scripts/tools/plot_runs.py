"""The picture of compare.py: quality against MoE FLOPs, quality against seconds, learning curves."""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)
from presets import MODELS  # noqa: E402

# A family has a hue: black dense, blue threshold (pink with a budget), orange top-k, a colour of its own for
# each other router.
COLOURS = {
    "dense": "#202020", "hash": "#2ca02c", "base": "#9467bd", "gshard": "#8c564b", "expert-choice": "#17a2a2",
    "switch": "#fdae6b", "topk-s2": "#f08020", "topk-s4": "#c85a0a", "topk-s8": "#8a3b00",
    "xmoe-s1": "#9ecae1", "xmoe-s2": "#5aa2d0", "xmoe-s4": "#2070b4", "xmoe-s8": "#08306b",
    "dense-wide": "#7f7f7f", "split-s8": "#bcbd22", "xmoe-s4-budget": "#e377c2", "xmoe-s8-budget": "#a3267f",
}  # fmt: skip
MARKERS = {"threshold": "o", "topk": "s", "": "X"}  # by router; others have a diamond

Curve = list[tuple[float, float]]


def styles_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of rows' names, which hold their model, perhaps with the preset before it and flags after it.

    A model with further flags has its colour, and a marker of its own that is not filled.
    """
    styles, hollow = {}, cycle("^v<>phd*")
    for name in names:
        model = next(word for word in name.split() if word in COLOURS)
        styles[name] = {"color": COLOURS[model], "marker": MARKERS.get(MODELS[model].router, "D")}
        if "--" in name:
            styles[name] |= {"marker": next(hollow), "markerfacecolor": "none"}
    return styles


def draw(
    points: dict[str, dict[str, tuple[float, float]]],
    curves: dict[str, list[Curve]],
    costs: tuple[str, str],
    quality: str,
    path: Path,
) -> None:
    """
    Args:
        points: by row, mean and standard deviation of each column.
        curves: by row, of each run (updates, perplexity in validation).
        costs: the columns against which quality is shown.
        quality: the column that says how good a model is.
    """
    styles = styles_of(points)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    lower = " (lower is better)" if quality.endswith("ppl") else ""
    for panel, column in zip(axes, costs, strict=False):
        for name, values in points.items():
            (x, x_deviation), (y, y_deviation) = values[column], values[quality]
            bars = {"linestyle": "none", "elinewidth": 1, "markersize": 8, "label": name}
            panel.errorbar(x, y, y_deviation, x_deviation, **bars, **styles[name])
        panel.set_xlabel(column)
        panel.set_ylabel(quality + lower)
        panel.margins(0.1)
    axes[0].set_xlim(left=0)
    axes[1].set_xlim(left=0)
    for name, of_runs in curves.items():
        for curve in filter(None, of_runs):  # none where validation was off
            axes[2].plot(*zip(*curve, strict=True), markersize=3, linewidth=1.3, **styles[name])
    axes[2].set_xlabel("updates")
    axes[2].set_ylabel("validation ppl (lower is better)")
    axes[2].set_yscale("log")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    columns = max(1, min(8, 130 // max(map(len, points))))  # of names, which a picture is wide enough for
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    plt.close(figure)
    partial.rename(path)
