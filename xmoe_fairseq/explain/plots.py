"""Plots as SVG for a page: they scale, and take its colour of text, be it dark or light."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from xmoe_fairseq.explain.collect import Layer
from xmoe_fairseq.explain.history import Curve, Run

INK = "#123456"  # stands for the page's colour of text
COLOURS = ("#3987e5", "#d9772b", "#2ca05a", "#c2528b", "#8d6bd1", "#8a7f2d", "#2aa3ad", "#cc4c4c")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "xmoe", "text.parse_math": False, "font.size": 9,
    "axes.prop_cycle": f"cycler('color', {[*COLOURS]})", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.15,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}  # fmt: skip
WIDTH = 4.6  # inches: its text can be read on a telephone
POINTS = 300  # of a curve, at most


def drawn(name: str, label: str, draw: Callable[[Figure, Axes], None], height: float = 3.0) -> str:
    """An <svg>.

    Args:
        name: begins all ids in it.
        label: what a screen reader says of it.
    """
    with rc_context(STYLE):
        figure, buffer = Figure(figsize=(WIDTH, height), layout="constrained"), StringIO()
        draw(figure, figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{name}-", text[text.index("<svg") :])
    head = f'<svg role="img" aria-label="{escape(label)}"'
    return text.replace(INK, "currentColor").replace("<svg", head, 1)


def loads(layers: Sequence[Layer]) -> str:
    """Each expert's rows over those of an even load, layers by experts; a cross where there are none, and
    nothing where an expert is not in use."""
    experts = max(len(layer.rows) for layer in layers)

    def draw(figure: Figure, axes: Axes) -> None:
        cells = np.full((len(layers), experts), np.nan)
        for number, of in enumerate(layers):
            cells[number, : len(of.rows)] = of.loads
            cells[number, [of.experts.index(name) for name in of.unused]] = np.nan
        image = axes.imshow(cells, cmap="cividis", vmin=0, aspect="auto", interpolation="none")
        dead = [(of.experts.index(name), i) for i, of in enumerate(layers) for name in of.dead]
        if dead:
            axes.plot(*zip(*dead, strict=True), "x", markersize=4, markeredgewidth=0.9, color="white")
        axes.set_yticks(range(len(layers)), [layer.name for layer in layers])
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False)
        figure.colorbar(image, label="load / even load", fraction=0.05)

    return drawn("loads", "Heat map: load of each expert, by layer", draw, 0.9 + 0.26 * max(len(layers), 3))


def lines(name: str, curves: Mapping[str, Curve], x: str, y: str, log: bool = False) -> str:
    columns = 1 if max(map(len, curves)) > 20 else 2  # of names

    def draw(figure: Figure, axes: Axes) -> None:
        for label, curve in curves.items():
            thin = [*curve[:: max(1, len(curve) // POINTS)], curve[-1]]
            marker = "o" if len(curve) == 1 else None
            axes.plot(*zip(*thin, strict=True), marker=marker, markersize=3.5, linewidth=1.4, label=label)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=columns)

    label = f"Plot: {y} against {x}, of {', '.join(curves)}"
    return drawn(name, label, draw, 2.8 + 0.17 * -(-len(curves) // columns))


def learning(runs: Sequence[Run]) -> str:
    """Of runs that have learned something."""
    return lines("learning", {run.name: run.learning for run in runs}, "updates", "perplexity", log=True)


def quality(reports: Mapping[str, Any]) -> str:
    """Perplexity against FLOPs of every t that was tried."""

    def draw(figure: Figure, axes: Axes) -> None:
        for name, report in reports.items():
            curve = zip(*points(report["curve"]), strict=True)
            axes.plot(*curve, "o-", markersize=4, linewidth=1.2, label=name)
            chosen, reference = report["rows"].get("chosen"), report["reference"]
            for one, marker, label in ((chosen, "D", "chosen"), (reference, "s", reference["name"])):
                if one:
                    (place,) = points([one])
                    axes.plot(*place, marker, markersize=8, markerfacecolor="none", color=INK, label=label)
        axes.set_xlim(left=0)
        axes.set_xlabel("FLOPs of the MoE layers / the dense FFN's")
        axes.set_ylabel("validation perplexity")
        figure.legend(loc="outside lower center", ncols=1)

    return drawn("quality", "Plot: validation perplexity against FLOPs", draw, 3.0 + 0.5 * len(reports))


def points(qualities: Sequence[Mapping[str, float]]) -> Curve:
    return sorted((quality["flops"], quality["perplexity"]) for quality in qualities)
