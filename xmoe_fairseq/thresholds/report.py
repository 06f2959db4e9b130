"""What was measured, as a table (Markdown), in full (JSON) and as a plot.

The JSON is the same for `xmoe-threshold`, `xmoe-convert` and the sweep: `about`, what was asked for;
`reference`, which the others are compared with, by its `name`; `rows`, settings by name, timed in turn with
it; `curve`, all settings that were tried, timed only in passing. Each is a `Quality` and its perplexity.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.tables import markdown
from xmoe_fairseq.thresholds.measure import Quality, shorten
from xmoe_fairseq.thresholds.search import Search
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.files import write_atomically

HEAD = ("setting", "t", "bits per token", "perplexity", "experts per token", "FLOPs / dense FFN",
        "FFN us per token")  # fmt: skip
SUFFIXES = (".md", ".json", ".png")  # of what is written beside a checkpoint


def report_paths(path: Path) -> list[Path]:
    return [path.with_suffix(suffix) for suffix in SUFFIXES]


def check_name(flag: str, path: Path, source: Path) -> None:
    """Raises FlagError: the report would take the name of the checkpoint, or of the one it is made from."""
    if path.suffix in SUFFIXES:
        raise FlagError(f"{flag} must not end in {path.suffix}, as its report does, got {path}")
    for report in report_paths(path):
        if report.exists() and source.exists() and report.samefile(source):
            raise FlagError(f"{flag} {path}: its report would overwrite {source}; name another")


class Report(NamedTuple):
    about: dict[str, Any]
    name: str  # of the reference
    reference: Quality
    rows: dict[str, Quality]
    curve: Sequence[Quality]


def report_of(
    search: Search, about: dict[str, Any], rows: dict[str, Quality], name: str, reference: Quality,
    run_reference: Callable[[Batches], float],
) -> Report:  # fmt: skip
    """Of a search; the rows are timed in turn with the reference, as `Meter.timed` says."""
    times = search.meter.timed([*rows.values()], reference, run_reference)
    return Report(about, name, reference, dict(zip(rows, times, strict=True)), [*search.points.values()])


def table(report: Report) -> str:
    """Markdown."""
    titles = [*HEAD, f"time / {report.name}"]
    rows = [
        [name, shorten(q.thresholds), f"{q.bits_per_token:.4f}", f"{q.perplexity:.2f}",
         f"{q.experts_per_token:.2f}" if q.experts_per_token else "", f"{q.flops:.3f}",
         f"{q.ffn_seconds * 1e6:.1f}", f"{time_ratio(q, report):.2f}"]
        for name, q in {report.name: report.reference, **report.rows}.items()
    ]  # fmt: skip
    return markdown(titles, rows)


def verdict(report: Report) -> str:
    """What the first row, which was chosen, costs and saves."""
    before, (name, after) = report.reference, next(iter(report.rows.items()))
    return (
        f"{name}: {after.flops:.2f} of the dense FFN's FLOPs ({report.name}: {before.flops:.2f}),"
        f" {time_ratio(after, report):.2f} times its FFNs' time here, perplexity {after.perplexity:.2f}"
        f" ({before.perplexity:.2f})"
    )


def time_ratio(quality: Quality, report: Report) -> float:
    return quality.ffn_seconds / max(report.reference.ffn_seconds, 1e-12)


def write_report(path: Path, report: Report) -> None:
    """Print the table, and write all beside the checkpoint `path`: its name with .md, .json and .png.

    Raises:
        WriteError.
    """
    settings = "\n".join(f"- {key}: {value}" for key, value in report.about.items())
    markdown_file, json_file, plot_file = files = report_paths(path)
    write_atomically(markdown_file, f"# {path.name}\n\n{settings}\n\n{table(report)}\n{verdict(report)}\n")
    write_json(json_file, report)
    write_atomically(plot_file, lambda file: plot(file, report))
    print(f"{table(report)}{verdict(report)}\nwritten: " + ", ".join(map(str, [path, *files])))


def write_json(path: Path, report: Report) -> None:
    record = {
        "about": report.about,
        "reference": {"name": report.name, **entry(report.reference)},
        "rows": {name: entry(quality) for name, quality in report.rows.items()},
        "curve": [entry(quality) for quality in report.curve],
    }
    write_atomically(path, json.dumps(record, indent=1))


def entry(quality: Quality) -> dict[str, Any]:
    return {**asdict(quality), "perplexity": quality.perplexity}


def plot(file: IO[bytes], report: Report) -> None:
    """Quality against FLOPs of all that was measured, and against time of the rows, which were timed well."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    flops = [(quality.flops, quality.perplexity) for quality in report.curve]
    times = [(time_ratio(quality, report), quality.perplexity) for quality in report.rows.values()]
    panels = [("FLOPs of the FFNs / dense", report.reference.flops, flops),
              (f"seconds in the FFNs / {report.name}", 1.0, times)]  # fmt: skip
    for axis, (label, x, points) in zip(axes, panels, strict=True):
        axis.axhline(report.reference.perplexity, color="0.6", linewidth=1, linestyle="--")
        axis.plot([x], [report.reference.perplexity], "s", color="C3", label=report.name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label="other t")
        axis.set_xlim(left=0)  # after plotting: a limit ends the automatic scaling
    axes[0].set_ylabel("validation perplexity")
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120, format="png")
