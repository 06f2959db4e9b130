"""How models come along in training: learning curves as the difference from one of them, experts, entropy.

    python scripts/run.py experiments.plot_training RUN ... --against MODEL [--models MODEL ...] --out FILE

Three panels over updates, a line a model, the mean of its seeds: perplexity in validation over that of MODEL
with the same seed, in per cent (raw curves lie on one another); experts per token, and the entropy of the
router's probabilities, of each log interval of training, means of the sides that have experts. MODEL as the
table of compare.sh names it, with its flags. What is drawn is in FILE.json beside it.
"""

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.plot_runs import styles_of
from experiments.results import check_ending, read_run, records, write_json
from experiments.runs import Rows, Run, alike, row_named, rows_of
from xmoe_fairseq_compat.errors import UserError

Curve = dict[float, float]  # by updates
EXPERTS, ENTROPY = (r"moe_(encoder|decoder)_" + what for what in ("experts_per_token", "router_entropy"))
CHANGE, PER_TOKEN, NATS = "validation ppl against {}, %", "experts/token", "entropy of the router, nats"


def learning(run: Run) -> Curve:
    found = records(run.folder / "train.log", "valid")
    return {one["num_updates"]: one["ppl"] for one in found if "ppl" in one}


def logged(run: Run, pattern: str) -> Curve:
    """What matches in the records of training, the sides' mean; what a resumed run repeats counts."""
    curve: Curve = {}
    for one in records(run.folder / "train.log", "train_inner"):
        if values := [value for key, value in one.items() if re.fullmatch(pattern, key)]:
            curve[one["num_updates"]] = statistics.mean(values)
    return curve


def change(own: Curve, base: Curve) -> Curve:
    """In per cent, where both have been validated."""
    return {update: 100 * (own[update] / base[update] - 1) for update in own if update in base}


def mean(curves: Iterable[Curve]) -> Curve:
    """At each update of those that have got so far."""
    values = defaultdict(list)
    for curve in curves:
        for update, value in curve.items():
            values[update].append(value)
    return {update: statistics.mean(values[update]) for update in sorted(values)}


def curves_of(rows: Rows, against: str) -> dict[str, dict[str, Curve]]:
    """By panel, then by row."""
    base = {run.seed: learning(run) for run in row_named("--against", against, rows)}
    panels: dict[str, Callable[[Run], Curve]] = {
        CHANGE.format(against): lambda run: change(learning(run), base.get(run.seed, {})),
        PER_TOKEN: lambda run: logged(run, EXPERTS),
        NATS: lambda run: logged(run, ENTROPY),
    }
    return {
        panel: {name: curve for name, runs in rows.items() if (curve := mean(map(read, runs)))}
        for panel, read in panels.items()
    }


def draw(panel: Any, title: str, curves: dict[str, Curve], styles: dict[str, dict[str, Any]]) -> None:
    for name, curve in curves.items():
        panel.plot(*zip(*curve.items(), strict=True), linewidth=1.2, **styles[name] | {"marker": ""})
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel("updates")
    if title == PER_TOKEN:
        panel.set_ylim(bottom=0)
    ends = {name: list(curve.items())[-1] for name, curve in curves.items()}
    plots.label_ends(panel, [(*end, plots.short(name), styles[name]["color"]) for name, end in ends.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="they need not be at their end")
    parser.add_argument("--against", required=True, metavar="MODEL")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="in it (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    check_ending("--out", args.out, ".png")
    rows = rows_of(alike([Run(folder, read_run(folder), {}) for folder in args.runs]))
    found = curves_of(rows, args.against)
    shown = {name: row_named("--models", name, rows) for name in args.models or rows}
    styles = styles_of(shown)
    panels = {title: {n: c for n, c in curves.items() if n in shown} for title, curves in found.items()}
    panels = {title: curves for title, curves in panels.items() if curves}  # none: dense models alone
    if not panels:
        raise UserError(f"{args.runs[0]}/train.log: must have records of fairseq-train, in JSON")
    figure, axes = plots.panels(1, len(panels), 6 * len(panels), 4.2)
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        draw(panel, title, curves, styles)
    plots.save(figure, args.out)
    write_json(args.out.with_suffix(".json"), panels)
    print(f"plot_training: {args.out}")


if __name__ == "__main__":
    main()
