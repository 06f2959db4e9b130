"""What lies beside a checkpoint, as plots and tables of the page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from xmoe_fairseq.explain import plots
from xmoe_fairseq.explain.collect import Layer
from xmoe_fairseq.explain.history import LOG, Run, experts_of_layers, threshold_reports
from xmoe_fairseq.load import FILE as LOADS
from xmoe_fairseq.thresholds.measure import shorten

RUNS = ("run", "updates", "perplexity", "experts per token*", "FLOPs / dense FFN*", "s/update")
SETTINGS = ("setting", "t", "experts per token", "FLOPs / dense FFN", "perplexity")


def beside(
    checkpoint: Path, own: Run | None, others: Sequence[Run], layers: Sequence[Layer]
) -> tuple[dict[str, str], dict[str, Any]]:
    """SVG, or a line that says what is missing; and tables.

    Args:
        own: what the log beside it says, if there is one.
        others: to compare with.

    Raises:
        UserError: a file is damaged.
    """
    runs = [own, *others] if own else others
    curves = experts_of_layers(checkpoint.parent, {layer.name: layer.shared for layer in layers})
    if own and not any(len(curve) > 1 for curve in curves.values()):
        curves = {side or "all layers": curve for side, curve in own.experts.items()}
    learning, reports = [run for run in runs if run.learning], threshold_reports(checkpoint)
    figures = {
        "loads": plots.loads(layers),
        "experts": plots.lines("experts", curves, "updates", "experts per token") if curves else
        missing(f"Experts per token over training: no {LOG} or {LOADS} beside the checkpoint says."),
        "learning": plots.learning(learning) if learning else
        missing(f"Learning curves: there is no {LOG} beside the checkpoint; --runs adds others."),
        "quality": plots.quality(reports) if reports else
        missing(f"To see what other thresholds cost: xmoe-threshold {checkpoint} --data DATA --budget B"),
    }  # fmt: skip
    rows = [row for name, report in reports.items() for row in settings(name, report, len(reports) > 1)]
    tables = {
        "runs": {
            "caption": "Runs (*: encoder, decoder)",
            "head": RUNS,
            "rows": [row_of(run) for run in runs],
        },
        "thresholds": {"caption": "Thresholds", "head": SETTINGS, "rows": rows},
    }
    return figures, {place: table for place, table in tables.items() if table["rows"]}


def row_of(run: Run) -> list[str]:
    def by_side(values: dict[str, float]) -> str:
        return ", ".join(f"{value:.2f}" for value in values.values())

    updates, perplexity = run.learning[-1] if run.learning else (0, None)
    return [
        run.name, f"{updates:.0f}", "" if perplexity is None else f"{perplexity:.2f}",
        by_side({side: curve[-1][1] for side, curve in run.experts.items()}) or "dense", by_side(run.flops),
        "" if run.seconds is None else f"{run.seconds:.3f}",
    ]  # fmt: skip


def settings(name: str, report: Any, many: bool) -> list[list[str]]:
    """By what they compute."""
    named = {report["reference"]["name"]: report["reference"], **report["rows"]}
    return [
        [f"{name}: {setting}" if many else setting, shorten(each["thresholds"]),
         f"{each['experts_per_token']:.2f}", f"{each['flops']:.3f}", f"{each['perplexity']:.2f}"]
        for setting, each in sorted(named.items(), key=lambda item: item[1]["flops"])
    ]  # fmt: skip


def missing(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'
