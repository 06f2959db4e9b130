"""What a benchmark found, as Markdown tables and as JSON."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing, machine
from experiments.results import publish
from xmoe_fairseq.tables import markdown

Row = dict[
    str, Any
]  # "timings": {name: Timing}, the first of which the others are compared with; and what about


def write_table(results: dict[str, Any], parts: Iterable[str], folder: Path) -> None:
    """
    Args:
        parts: lines and tables, which follow the machine's line, between empty lines.
    """
    here = machine()
    about = ", ".join(f"{name} {value}" for name, value in here.items())
    text = "\n\n".join(part.strip("\n") for part in [about, *parts]) + "\n"
    publish(folder / "benchmark", text, {"machine": here, **results})
    print(f"{folder}/benchmark.md, .json")


def ratios(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """What `keys` say about a row, the first one's milliseconds, the others' ratios to it, round by round:
    median (quartiles)."""
    names = dict.fromkeys(name for row in rows for name in row["timings"])
    first = next(iter(names))
    cells = [
        [*(row[key] for key in keys), *(cell(row["timings"].get(name), name == first) for name in names)]
        for row in rows
    ]
    return markdown([*keys, f"{first}, ms", *[*names][1:]], cells)


def cell(timing: Timing | None, is_first: bool) -> str:
    if timing is None:
        return ""
    if is_first:
        return f"{timing.milliseconds:,.{0 if timing.milliseconds >= 100 else 2}f}"
    return f"{timing.ratio:.2f} ({timing.low:.2f} to {timing.high:.2f})"
