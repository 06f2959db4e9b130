"""Trained models at other thresholds: what they lose, compute and take. See sweep_threshold.sh."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from torch import nn

from benchmarks.timing import add_rounds
from benchmarks.trained_layers import every_of, places
from experiments import plots
from experiments.results import mean_and_deviation, read_run
from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe.rules import rule_named
from xmoe_fairseq.tables import markdown
from xmoe_fairseq.thresholds.checkpoint import check_is_file, open_meter, open_model, whole_valid
from xmoe_fairseq.thresholds.measure import Place, Quality, ffn_seconds, measure_dense
from xmoe_fairseq.thresholds.report import Report, write_json
from xmoe_fairseq_compat.files import write_atomically
from xmoe_fairseq_compat.misfits import settings_of

TITLES = ("t", "perplexity", "experts/token", "MoE FLOPs / dense FFN", "FFN seconds / {}", "perplexity / {}")
Row = dict[str, list[float]]  # by title, of each run


def measure(
    run: Path, dense: Quality | None, run_dense: Callable[[Batches], float] | None, args: argparse.Namespace
) -> tuple[Quality, list[Quality]]:
    """A run at each threshold, and what its seconds are given by: the dense model, or the last threshold."""
    data = Path(read_run(run)["data"])
    meter = open_meter(run / "checkpoint_best.pt", data)
    found = [meter.measure([t] * len(meter.routers)) for t in args.thresholds]
    run_base = run_dense or partial(meter.seconds, found[-1].thresholds)
    return dense or found[-1], meter.timed(found, dense or found[-1], run_base, args.rounds, args.tokens)


def open_dense(run: Path) -> tuple[nn.Module, list[Place], Batches]:
    """Its FFNs are those that have experts in the others."""
    model, task, cfg = open_model(run / "checkpoint_best.pt", Path(read_run(run)["data"]))
    layers: list[Any] = places(model, cfg.model, every_of(run))
    ffns = [(layer.moe,) * 2 if hasattr(layer, "moe") else (layer.fc1, layer.fc2) for layer in layers]
    return model, ffns, whole_valid(task, cfg)


def values(quality: Quality, base: Quality, last: Quality) -> list[float]:
    """In the order of TITLES; compared with the same run: seeds differ by more than thresholds."""
    time = quality.ffn_seconds / base.ffn_seconds
    numbers = (quality.perplexity, quality.experts_per_token, quality.flops, time)
    return [quality.thresholds[0], *numbers, quality.perplexity / last.perplexity]


def plot(rows: list[Row], titles: list[str], dense: list[float], path: Path) -> None:
    figure, axes = plots.panels(1, 2, 9, 3.4, sharey=True)
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
    axes[0].set_ylabel("validation perplexity (lower is better)")
    plots.save(figure, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[], metavar="T",
                        help="default: 0.3 to 1.0; by the rule probability 0.24 to 0")  # fmt: skip
    parser.add_argument("--dense", type=Path, nargs="+", default=[], metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    add_rounds(parser, default=15)
    parser.add_argument("--tokens", type=int, default=4000, help="in each round that is timed")
    args = parser.parse_args()
    if bad := [t for t in args.thresholds if not 0 <= t <= 1]:
        parser.error(f"--thresholds must be in [0, 1], got {bad[0]:g}")
    args.thresholds = thresholds(args.runs[0], args.thresholds)
    return args


def thresholds(run: Path, given: list[float]) -> list[float]:
    """To be measured, that of the fewest experts first; none given = at levels 0.3 to 1 of the run's rule."""
    read_run(run)
    check_is_file(run / "checkpoint_best.pt")
    settings = settings_of(load_checkpoint_to_cpu(str(run / "checkpoint_best.pt")))
    rule = rule_named(settings.get("moe_threshold_rule", "mass"))
    found = given or [float(f"{rule.threshold(tenth / 10):.2g}") for tenth in range(3, 11)]
    return sorted(set(found), reverse=rule.threshold(1.0) < rule.threshold(0.0))


def table(rows: list[Row], titles: list[str], dense: list[float]) -> str:
    digits = dict(zip(titles[1:], (2, 2, 2, 2, 3), strict=True))
    body = [
        [f"{row['t'][0]:g}", *(mean_and_deviation(row[title], n) for title, n in digits.items())]
        for row in rows
    ]
    if dense:
        body.append(["dense", mean_and_deviation(dense, 2), "-", "1.00", "1.00", "-"])
    return markdown(titles, body)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    last = f"that at t = {args.thresholds[-1]:g}"
    reference = "dense" if args.dense else last
    titles = [*(title.format(reference) for title in TITLES[:-1]), TITLES[-1].format(last)]
    rows: list[Row] = [{title: [] for title in titles} for _ in args.thresholds]
    of_runs: dict[str, Quality] = {}
    dense = [open_dense(run) for run in args.dense]
    of_dense = [measure_dense(*each) for each in dense]
    run_dense = partial(ffn_seconds, *dense[0][:2]) if dense else None
    for run in args.runs:
        base, found = measure(run, of_dense[0] if of_dense else None, run_dense, args)
        for row, quality in zip(rows, found, strict=True):
            of_runs[f"{run}, t = {quality.thresholds[0]:g}"] = quality
            for title, value in zip(titles, values(quality, base, found[-1]), strict=True):
                row[title].append(value)
    text = table(rows, titles, [quality.perplexity for quality in of_dense])
    print(text, end="")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "sweep.md", text)
    about = {"runs": [*map(str, args.runs)], "dense": [*map(str, args.dense)]}
    write_json(args.out / "sweep.json", Report(about, reference, base, of_runs, [*of_runs.values()]))
    plot(rows, titles, [quality.perplexity for quality in of_dense], args.out / "sweep.png")
    print(f"sweep_threshold: {args.out}/sweep.md, sweep.json, sweep.png")


if __name__ == "__main__":
    main()
