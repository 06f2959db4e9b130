"""What a benchmark found, as a Markdown table, as JSON and, of the layer's, as a plot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing
from experiments import plots
from experiments.results import publish
from xmoe_fairseq.tables import markdown

Results = dict[str, Any]


def write_table(results: Results, parts: Iterable[str], folder: Path) -> None:
    """
    Args:
        parts: lines and tables, between empty lines.
    """
    publish(folder / "benchmark", "\n\n".join(part.strip("\n") for part in parts) + "\n", results)
    print(f"{folder}/benchmark.md, .json")


def layer_table(results: Results) -> list[str]:
    """Ratios are to the first of a row, round by round: median (quartiles)."""
    rows = [
        [str(threads), f"{section}: {direction}", case(row), *cells(timings)]
        for threads, sections in results["threads"].items()
        for section, found in sections.items()
        for row in found
        for direction, timings in row.items()
        if isinstance(timings, dict)
    ]
    titles = ("threads", "what", "case", "first", "the others: ms, ratio (quartiles)")
    parts = [about(results["machine"]), markdown(titles, rows)]
    if memory := results.get("peak memory, MB"):
        parts.append(
            f"Peak memory of forward + backward: layer {memory['layer']:.0f} MB, dense FFN on as many rows "
            f"{memory['dense']:.0f} MB ({memory['layer'] / memory['dense']:.2f} x)"
        )
    return parts


def case(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if not isinstance(value, dict))


def cells(timings: dict[str, Timing]) -> list[str]:
    (first, base), *others = timings.items()
    return [f"{first} {base.milliseconds:.1f} ms", "; ".join(f"{name}: {timing}" for name, timing in others)]


def about(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def plot(results: Results, path: Path) -> None:
    figure, axes = plots.panels(1, len(results["threads"]), 10, 4, sharey=True)
    for panel, (threads, sections) in zip(axes, results["threads"].items(), strict=True):
        rows = sections["cost follows computation"]
        per_token = [row["per token"] for row in rows]
        for direction, marker in (("forward + backward", "o"), ("forward", "s")):
            for name, style in (("floor", "--"), ("layer", "-")):
                times = [row[direction][name].milliseconds for row in rows]
                panel.plot(per_token, times, style, marker=marker, label=f"{name}, {direction}")
        panel.set_title(f"{threads} thread{'s' if int(threads) > 1 else ''}")
        panel.set_xlabel("experts per token")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    axes[0].set_ylabel("ms")
    axes[0].legend()
    figure.suptitle("An MoE layer (2,048 tokens, width 512, 64 experts of width 256) and its floor")
    plots.save(figure, path)
