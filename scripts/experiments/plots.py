"""Pictures: panels that look alike, labels beside what they name, saved whole or not at all."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from xmoe_fairseq_compat.files import write_atomically

DPI, SMALL = 120, 8  # of labels, points
AROUND = [(math.cos(i * math.pi / 6), math.sin(i * math.pi / 6)) for i in range(12)]
DISTANCES = (7, 13, 20, 28, 37, 47, 58, 70, 85, 100)  # points, from what is labelled


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Inches; the panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return figure, axes


def short(name: str, width: int = 28) -> str:
    """A model with further flags, in lines: xmoe-s4 --moe-threshold 0.8 -> xmoe-s4, threshold 0.8."""
    text = name.replace(" --moe-", ", ")
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)


def label_points(panel: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Each at the nearest place where nothing is, with a line to its point where that is far.

    To be called when all is drawn.

    Args:
        points: x, y, text, colour.
    """
    figure: Any = panel.figure
    figure.draw_without_rendering()  # the panel's place in the picture
    unit = figure.dpi / 72
    taken = [Bbox.from_bounds(x - 5 * unit, y - 5 * unit, 10 * unit, 10 * unit)
             for x, y in (panel.transData.transform(point[:2]) for point in points)]  # fmt: skip
    inside = panel.get_window_extent()
    for x, y, text, colour in sorted(points, key=lambda point: -point[1]):
        label = panel.annotate(
            text, (x, y), (0, 0), textcoords="offset points", fontsize=SMALL, color=colour, linespacing=1.0
        )
        label.set_in_layout(False)
        for distance, (right, up) in ((d, way) for d in DISTANCES for way in AROUND):
            label.set_position((distance * right, distance * up))
            label.set_horizontalalignment("left" if right > 0.1 else "right" if right < -0.1 else "center")
            label.set_verticalalignment("bottom" if up > 0.6 else "top" if up < -0.6 else "center")
            place = label.get_window_extent()
            fits = inside.contains(*place.min) and inside.contains(*place.max)
            if fits and not place.count_overlaps(taken):
                break
        taken.append(place)
        if distance > DISTANCES[0]:
            panel.annotate("", (x, y), (distance * right, distance * up), textcoords="offset points",
                           arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6})  # fmt: skip


def apart(places: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Middles in ascending order, moved so that neighbours of these sizes do not overlap."""
    up, down = list(places), list(places)
    gaps = [(a + b) / 2 for a, b in pairwise(sizes)]
    for i, gap in enumerate(gaps):
        up[i + 1] = max(up[i + 1], up[i] + gap)
    for i, gap in reversed([*enumerate(gaps)]):
        down[i] = min(down[i], down[i + 1] - gap)
    return [(a + b) / 2 for a, b in zip(up, down, strict=True)]


def label_ends(panel: Axes, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """At the panel's right, in the order of the lines that end there, none over another.

    Args:
        ends: x, y, text, colour.
    """
    figure: Any = panel.figure
    figure.draw_without_rendering()
    ordered = sorted(ends, key=lambda end: end[1])
    ys = [panel.transData.transform((x, y))[1] for x, y, *_ in ordered]
    heights = [1.2 * SMALL * (text.count("\n") + 1) * figure.dpi / 72 for _, _, text, _ in ordered]
    line = {"arrowstyle": "-", "linewidth": 0.6, "linestyle": ":", "shrinkA": 1, "relpos": (0, 0.5)}
    for (x, y, text, colour), at in zip(ordered, apart(ys, heights), strict=True):
        height = panel.transAxes.inverted().transform((0, at))[1]
        panel.annotate(
            text, (x, y), (1.04, height), textcoords="axes fraction", fontsize=SMALL, color=colour,
            verticalalignment="center", annotation_clip=False, linespacing=1.0,
            arrowprops={**line, "color": colour},
        )  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))
