"""One table (Markdown and JSON) and one picture of runs that train.py trained and score.py scored.

    python scripts/tools/compare.py RUN ... --out FOLDER [--scores best|averageN] [--quality COLUMN]

Runs of one task on the same data. Runs that differ in the seed alone make one row: mean and, after ±,
standard deviation. What benchmark_checkpoints.sh measured is shown too, and takes the place of the seconds of
training, which other work on the machine disturbs, in the picture. Writes FOLDER/compare.md,
compare.json and compare.png.
"""

import argparse
import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plan import Plan
from plot_runs import draw
from presets import MODELS
from results import ResultError, markdown, read, records, seconds_per_update, write, write_json

SHOWN = {"wmt": ("bleu", "chrf++", "perplexity"), "lm": ("perplexity", "perplexity_per_word")}
TITLES = {"bleu": "BLEU", "chrf++": "chrF++", "perplexity": "ppl", "perplexity_per_word": "ppl/word"}
FFN_SECONDS = "FFN seconds / the first's"
FLOPS_SPLIT = "test"  # the split whose routing is shown


@dataclass
class Run:
    """What one run's files say."""

    folder: Path
    about: dict[str, Any]
    values: dict[str, float]  # by column
    curve: list[tuple[float, float]] = field(default_factory=list)  # updates, perplexity in validation

    @property
    def name(self) -> str:
        """Of the row, but for the preset: runs of one name differ in the seed alone."""
        return " ".join([self.about["model"], *self.about["flags"]])


def load(folder: Path, tag: str) -> Run:
    about, scores = (json.loads(read(folder / name)) for name in ("run.json", f"scores.{tag}.json"))
    log, splits = folder / "train.log", scores["splits"]
    values: dict[str, float] = {}
    for split, result in splits.items():
        values |= {f"{split} {TITLES[key]}": result[key] for key in SHOWN[about["task"]]}
    dense_flops = Plan(about["task"], about["preset"], about["model"], 1).dense_flops
    sides = list(splits[FLOPS_SPLIT]["routing"].values())
    values["experts/token"] = statistics.mean(s["experts"] for s in sides) if sides else math.nan
    values["MoE FLOPs / dense FFN"] = statistics.mean(s["flops"] for s in sides) if sides else dense_flops
    values["s/update"] = seconds_per_update(log)
    seconds = folder / "seconds.json"
    values[FFN_SECONDS] = json.loads(read(seconds))["ratio"] if seconds.exists() else math.nan
    valid = records(log, "valid")
    values["updates"] = max(one["num_updates"] for one in [*valid, *records(log, "train_inner")])
    values["training seconds"] = values["updates"] * values["s/update"]
    values["parameters (M)"] = parameters(log) / 1e6
    curve = sorted({one["num_updates"]: one["ppl"] for one in valid if "ppl" in one}.items())
    return Run(folder, about, values, curve)


def parameters(log: Path) -> int:
    """fairseq counts the experts of expert parallelism apart, and those of one rank only."""
    numbers = re.findall(r"num\. (?:shared|expert) model params: ([\d,]+)", read(log))[:2]
    return sum(int(number.replace(",", "")) for number in numbers)


def check(runs: list[Run]) -> None:
    for key, what in (("task", "one task"), ("data", "the same data")):
        found = sorted({run.about[key] for run in runs})
        if len(found) > 1:
            raise ResultError(f"runs must be of {what} to be compared, got {', '.join(found)}")


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by row, in the order of presets.py."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda r: (r.about["preset"], list(MODELS).index(r.about["model"]))):
        found.setdefault((run.about["preset"], run.name), []).append(run)
    many = len({preset for preset, _ in found}) > 1
    return {f"{preset} {name}" if many else name: members for (preset, name), members in found.items()}


def mean(members: list[Run], column: str) -> float:
    return statistics.mean(run.values[column] for run in members)


DIGITS = {"updates": 0, "training seconds": 0, "s/update": 3, "parameters (M)": 1}


def spread(members: list[Run], column: str) -> float:
    """Standard deviation; 0 of one run."""
    return statistics.stdev(run.values[column] for run in members) if len(members) > 1 else 0.0


def cell(members: list[Run], column: str) -> str:
    value, digits = mean(members, column), DIGITS.get(column, 2)
    if math.isnan(value):
        return "-"
    deviation = spread(members, column)
    return f"{value:,.{digits}f}" + (f" ± {deviation:,.{digits}f}" if deviation else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--scores", default="best", metavar="best|averageN", help="which scores.*.json of the runs"
    )
    parser.add_argument(
        "--quality", metavar="COLUMN", help="what the picture shows (default: test BLEU, or test ppl)"
    )
    args = parser.parse_args()
    try:
        runs = [load(folder, args.scores) for folder in args.runs]
        check(runs)
    except ResultError as error:
        raise SystemExit(f"compare: {error}; train and score each run first") from None
    rows, columns = groups(runs), list(runs[0].values)
    if all(math.isnan(run.values[FFN_SECONDS]) for run in runs):
        columns.remove(FFN_SECONDS)
    quality = args.quality or ("test BLEU" if runs[0].about["task"] == "wmt" else "test ppl")
    if quality not in columns:
        raise SystemExit(f"compare: --quality must be one of {', '.join(columns)}, got {quality}")
    table = markdown(
        ["model", "runs", *columns],
        [[name, str(len(members)), *(cell(members, c) for c in columns)] for name, members in rows.items()],
    )
    print(table, end="")
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "compare.md", table)
    everything = [
        {"run": str(run.folder), **run.about, "values": run.values, "curve": run.curve} for run in runs
    ]
    write_json(args.out / "compare.json", everything)
    timed = all(not math.isnan(run.values[FFN_SECONDS]) for run in runs)
    costs = ("MoE FLOPs / dense FFN", FFN_SECONDS if timed else "training seconds")
    points = {
        name: {c: (mean(members, c), spread(members, c)) for c in (*costs, quality)}
        for name, members in rows.items()
    }
    curves = {name: [run.curve for run in members] for name, members in rows.items()}
    draw(points, curves, costs, quality, args.out / "compare.png")
    print(f"compare: {args.out}/compare.md, compare.json, compare.png")


if __name__ == "__main__":
    main()
