"""Trained models at other thresholds: what they lose, compute and take. See sweep_threshold.sh."""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from results import ResultError, markdown, read, records, write, write_json
from threshold_meter import Meter
from timing import add_rounds, in_turn
from torch import nn
from trained_layers import work_of

from xmoe_fairseq.moe import ThresholdRouter

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

TITLES = ("t", "perplexity", "experts/token", "MoE FLOPs / dense FFN", "FFN seconds / {}", "perplexity / {}")
Row = dict[str, list[float]]  # by title, of each run


def measure(run: Path, thresholds: list[float]) -> list[dict[str, float]]:
    """Quality and FLOPs of one run, a row for each threshold."""
    meter = Meter(run / "checkpoint_best.pt", Path(json.loads(read(run / "run.json"))["data"]))
    rows = []
    for t in thresholds:
        point = meter.measure((t,) * len(meter.routers))
        rows.append({TITLES[1]: point.perplexity, TITLES[2]: point.experts, TITLES[3]: point.flops})
    return rows


def at(model: nn.Module, threshold: float, work: Callable[[], None]) -> Callable[[], None]:
    routers = [module for module in model.modules() if isinstance(module, ThresholdRouter)]

    def run() -> None:
        for router in routers:
            router.threshold, router.budget = threshold, None
        work()

    return run


@torch.no_grad()
def seconds(run: Path, dense: Path | None, thresholds: list[float], rounds: int, tokens: int) -> list[float]:
    """Of the FFNs over the dense model's; without one, over those of the last threshold."""
    model, work = work_of(run, tokens)
    functions = {str(t): at(model, t, work) for t in thresholds}
    first = {"dense": work_of(dense, tokens)[1]} if dense else {"last": functions[str(thresholds[-1])]}
    timings = in_turn({**first, **functions}, rounds)
    return [timings[str(t)].ratio for t in thresholds]


def best_perplexity(run: Path) -> float:
    """Of what training logged."""
    return min(one["ppl"] for one in records(run / "train.log", "valid"))


def cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def plot(rows: list[Row], titles: list[str], dense: list[float], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for panel, title in zip(axes, titles[3:5], strict=True):
        points = [(statistics.mean(row[title]), statistics.mean(row[titles[1]])) for row in rows]
        panel.plot(*zip(*points, strict=True), "o-", color="#2070b4")
        for row, point in zip(rows, points, strict=True):
            panel.annotate(f"{row['t'][0]:g}", point, xytext=(4, 5), textcoords="offset points", fontsize=8)
        if dense:
            panel.axhline(statistics.mean(dense), color="#202020", linestyle="--", label="dense")
            panel.legend(frameon=False)
        panel.set_xlabel(title)
        panel.margins(0.1)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("validation perplexity (lower is better)")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.rename(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    tenths = [tenth / 10 for tenth in range(3, 11)]
    parser.add_argument("--thresholds", type=float, nargs="+", default=tenths, metavar="T", help="0.3 to 1.0")
    parser.add_argument("--dense", type=Path, nargs="+", default=[], metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    add_rounds(parser, default=15)
    parser.add_argument("--tokens", type=int, default=4000, help="at most in the timed batch")
    args = parser.parse_args()
    if bad := [t for t in args.thresholds if not 0 <= t <= 1]:
        parser.error(f"--thresholds must be in [0, 1], got {bad[0]:g}")
    args.thresholds = sorted(set(args.thresholds))
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    dense = args.dense[0] if args.dense else None
    last = f"that at t = {args.thresholds[-1]:g}"
    titles = [title.format("dense" if dense else last) for title in TITLES[:-1]] + [TITLES[-1].format(last)]
    rows: list[Row] = [{"t": [t]} for t in args.thresholds]
    try:
        for run in args.runs:
            took = seconds(run, dense, args.thresholds, args.rounds, args.tokens)
            for row, found, ratio in zip(rows, measure(run, args.thresholds), took, strict=True):
                for title, value in (found | {titles[4]: ratio}).items():
                    row.setdefault(title, []).append(value)
        dense_perplexities = [best_perplexity(run) for run in args.dense]
    except ResultError as error:
        raise SystemExit(f"sweep_threshold: {error}") from None
    for row in rows:  # of the same run: seeds differ by more than thresholds
        pairs = zip(row[titles[1]], rows[-1][titles[1]], strict=True)
        row[titles[5]] = [perplexity / of_last for perplexity, of_last in pairs]
    body = [
        [f"{row['t'][0]:g}", *(cell(row[title], 2) for title in titles[1:5]), cell(row[titles[5]], 3)]
        for row in rows
    ]
    if dense_perplexities:
        body.append(["dense", cell(dense_perplexities, 2), "-", "1.00", "1.00", "-"])
    table = markdown(titles, body)
    print(table, end="")
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "sweep.md", table)
    about: dict[str, Any] = {"runs": list(map(str, args.runs)), "dense": list(map(str, args.dense))}
    about["dense perplexity"] = dense_perplexities or [math.nan]
    write_json(args.out / "sweep.json", about | {"rows": rows})
    plot(rows, titles, dense_perplexities, args.out / "sweep.png")
    print(f"sweep_threshold: {args.out}/sweep.md, sweep.json, sweep.png")


if __name__ == "__main__":
    main()
