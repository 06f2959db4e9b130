"""Pictures: panels that look alike, saved whole or not at all."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xmoe_fairseq_compat.files import write_atomically


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Inches; the panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
