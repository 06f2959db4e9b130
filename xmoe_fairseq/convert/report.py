"""A table (Markdown, JSON) and a plot of what a converted model costs and loses."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from xmoe_fairseq.convert.measure import Quality
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.files import write_atomically

HEAD = ("setting", "t", "experts per token", "FFN FLOPs", "loss", "perplexity", "FFN us per token", "time")


def table(dense: Quality, rows: dict[str, Quality]) -> str:
    """Markdown: FLOPs and time over the dense model's, loss in nats per token."""
    cells = []
    for name, quality in {"dense": dense, **rows}.items():
        is_dense = quality is dense
        cells.append([
            name, "" if is_dense else shorten(quality.thresholds),
            "" if is_dense else f"{quality.experts_per_token:.2f}", f"{quality.flops:.3f}",
            f"{quality.loss:.4f}", f"{quality.perplexity:.2f}", f"{quality.ffn_seconds * 1e6:.1f}",
            f"{quality.ffn_seconds / max(dense.ffn_seconds, 1e-12):.2f}",
        ])  # fmt: skip
    return markdown(HEAD, cells)


def shorten(thresholds: list[float]) -> str:
    texts = [f"{t:.3f}" for t in thresholds]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def write_report(
    path: Path, about: dict[str, Any], dense: Quality, rows: dict[str, Quality], curve: list[Quality]
) -> list[Path]:
    """Beside the checkpoint `path`: its name with .md, .json and .png. Raises WriteError."""
    settings = "\n".join(f"- {key}: {value}" for key, value in about.items())
    text = f"# {path.name}\n\n{settings}\n\n{table(dense, rows)}"
    record = {
        "about": about, "dense": entry(dense),
        "rows": {name: entry(quality) for name, quality in rows.items()},
        "curve": [entry(quality) for quality in curve],
    }  # fmt: skip
    written = [path.with_suffix(suffix) for suffix in (".md", ".json", ".png")]
    write_atomically(written[0], text)
    write_atomically(written[1], json.dumps(record, indent=1))
    write_atomically(written[2], lambda file: plot(file, dense, list(rows.values()), curve))
    return written


def entry(quality: Quality) -> dict[str, Any]:
    return {**asdict(quality), "perplexity": quality.perplexity}


def plot(file: IO[bytes], dense: Quality, rows: list[Quality], curve: list[Quality]) -> None:
    """Quality against FLOPs of all that was measured, and against time of the rows, which were timed well."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, label in zip(axes, ("FLOPs of the FFNs / dense", "seconds in the FFNs / dense"), strict=True):
        axis.axhline(dense.perplexity, color="0.6", linewidth=1, linestyle="--")
        axis.plot([1.0], [dense.perplexity], "s", color="C3", label="dense")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    by_flops = sorted(curve, key=lambda quality: quality.flops)
    axes[0].plot(
        [q.flops for q in by_flops], [q.perplexity for q in by_flops], "o-", markersize=4, label="sparse"
    )
    by_time = sorted(rows, key=lambda quality: quality.ffn_seconds)
    seconds = [q.ffn_seconds / max(dense.ffn_seconds, 1e-12) for q in by_time]
    axes[1].plot(seconds, [q.perplexity for q in by_time], "o-", markersize=4)
    for axis in axes:  # after plotting: a limit ends the automatic scaling
        axis.set_xlim(left=0)
    axes[0].set_ylabel("validation perplexity")
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120, format="png")
