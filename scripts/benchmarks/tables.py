"""What a benchmark found, as a Markdown table, as JSON and as a plot."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from timing import Timing

Results = dict[str, Any]


def write_report(results: Results, folder: Path) -> None:
    write_table(results, markdown(results), folder)
    if all("cost follows computation" in sections for sections in results["threads"].values()):
        plot(results, folder / "benchmark.png")
        print(f"{folder}/benchmark.png")


def write_table(results: Results, lines: Iterable[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = "\n".join(lines) + "\n"
    _replace(folder / "benchmark.json", json.dumps(results, indent=1, default=_plain) + "\n")
    _replace(folder / "benchmark.md", table)
    print(table, end="")
    print(f"{folder}/benchmark.md, .json")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(type(value))


def markdown(results: Results) -> Iterator[str]:
    """Ratios are to the first of a row, round by round: median (quartiles)."""
    yield about(results["machine"])
    yield ""
    yield "| threads | what | case | first | the others: ms, ratio (quartiles) |"
    yield "|---|---|---|---|---|"
    for threads, sections in results["threads"].items():
        for section, rows in sections.items():
            for row in rows:
                case = ", ".join(
                    f"{name} {value:.4g}" for name, value in row.items() if not isinstance(value, dict)
                )
                for direction, timings in row.items():
                    if isinstance(timings, dict):
                        yield _line(threads, f"{section}: {direction}", case, timings)
    memory = results.get("peak memory, MB", {})
    if memory:
        ratio = memory["layer"] / memory["dense"]
        yield ""
        yield (
            f"Peak memory of forward + backward: layer {memory['layer']:.0f} MB, dense FFN on as many rows "
            f"{memory['dense']:.0f} MB ({ratio:.2f} x)"
        )


def about(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _line(threads: Any, what: str, case: str, timings: dict[str, Timing]) -> str:
    (first, base), *others = timings.items()
    rest = "; ".join(f"{name}: {timing}" for name, timing in others)
    return f"| {threads} | {what} | {case} | {first} {base.milliseconds:.1f} ms | {rest} |"


def plot(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results["threads"]), figsize=(10, 4), sharey=True, squeeze=False)
    for axis, (threads, sections) in zip(axes[0], results["threads"].items(), strict=True):
        rows = sections["cost follows computation"]
        per_token = [row["per token"] for row in rows]
        for direction, marker in (("forward + backward", "o"), ("forward", "s")):
            for name, style in (("floor", "--"), ("layer", "-")):
                times = [row[direction][name].milliseconds for row in rows]
                axis.plot(per_token, times, style, marker=marker, label=f"{name}, {direction}")
        axis.set_title(f"{threads} thread{'s' if int(threads) > 1 else ''}")
        axis.set_xlabel("experts per token")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms")
    axes[0][0].legend()
    figure.suptitle("An MoE layer (2,048 tokens, width 512, 64 experts of width 256) and its floor")
    figure.tight_layout()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
