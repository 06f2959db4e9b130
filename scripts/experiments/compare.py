"""One table (Markdown and JSON) and one picture of runs that train.py trained and score.py scored.

    bash scripts/compare.sh RUN ...          (SCORES=best|averageN, QUALITY=COLUMN, OUT=FOLDER)

Runs of one task on the same data. Runs that differ in the seed alone make one row: mean and, after ±,
standard deviation. What benchmark_checkpoints.sh measured is shown too, and takes the place of the seconds of
training, which other work on the machine disturbs, in the picture. Writes FOLDER/compare.md,
compare.json, compare.png, and compare.html: which experts the first run's tokens take (xmoe-explain).
"""

import argparse
import math
import statistics
from pathlib import Path

from experiments.catalogue import models
from experiments.explain import write_page
from experiments.plan import Plan
from experiments.plot_runs import Run, draw
from experiments.results import (
    mean_and_deviation,
    median_seconds,
    parameters,
    publish,
    read_json,
    read_run,
    records,
)
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import FlagError, UserError

SHOWN = {"wmt": ("bleu", "chrf++", "perplexity"), "lm": ("perplexity", "perplexity_per_word")}
TITLES = {"bleu": "BLEU", "chrf++": "chrF++", "perplexity": "ppl", "perplexity_per_word": "ppl/word"}
FLOPS, FFN_SECONDS = "MoE FLOPs / dense FFN", "FFN seconds / the first's"
DIGITS = {"updates": 0, "training seconds": 0, "s/update": 3, "parameters (M)": 1}


def load(folder: Path, tag: str, flops_split: str = "test") -> Run:
    """
    Args:
        flops_split: whose routing is shown.
    """
    about, scores = read_run(folder), folder / f"scores.{tag}.json"
    log, splits = folder / "train.log", read_json(scores)["splits"]
    if flops_split not in splits:
        raise UserError(f"{scores}: holds no {flops_split}; score the run again without --splits")
    values: dict[str, float] = {}
    for split, result in splits.items():
        values |= {f"{split} {TITLES[key]}": result[key] for key in SHOWN[about["task"]]}
    plan = Plan(about["task"], about["preset"], about["model"])
    sides = list(splits[flops_split]["routing"].values())
    values["experts/token"] = statistics.mean(s["experts"] for s in sides) if sides else math.nan
    dense_flops = plan.ffn_dim / plan.size.ffn_dim
    values[FLOPS] = statistics.mean(s["flops"] for s in sides) if sides else dense_flops
    values["s/update"] = median_seconds(log)
    seconds = folder / "seconds.json"
    values[FFN_SECONDS] = read_json(seconds)["ratio"] if seconds.exists() else math.nan
    valid = records(log, "valid")
    logged = [*valid, *records(log, "train_inner"), *records(log, "train")]
    values["updates"] = max((one["num_updates"] for one in logged if "num_updates" in one), default=math.nan)
    values["training seconds"] = values["updates"] * values["s/update"]
    values["parameters (M)"] = parameters(log) / 1e6
    curve = sorted({one["num_updates"]: one["ppl"] for one in valid if "ppl" in one}.items())
    return Run(folder, about, values, curve)


def check(runs: list[Run]) -> None:
    for key, what in (("task", "one task"), ("data", "the same data")):
        found = sorted({run.about[key] for run in runs})
        if len(found) > 1:
            raise UserError(f"runs must be of {what} to be compared, got {', '.join(found)}")


def rows_of(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by row, in the order of models.toml."""
    found: dict[tuple[str, str], list[Run]] = {}
    order = list(models())
    for run in sorted(runs, key=lambda r: (r.about["preset"], order.index(r.about["model"]))):
        found.setdefault((run.about["preset"], run.name), []).append(run)
    many = len({preset for preset, _ in found}) > 1
    return {f"{preset} {name}" if many else name: members for (preset, name), members in found.items()}


def cell(members: list[Run], column: str) -> str:
    return mean_and_deviation([run.values[column] for run in members], DIGITS.get(column, 2))


def write_page_of(runs: list[Run], tag: str, page: Path) -> None:
    """Of the first run with experts, beside the others."""
    first = next((run for run in runs if not math.isnan(run.values["experts/token"])), None)
    if first:
        checkpoint = read_json(first.folder / f"scores.{tag}.json").get("checkpoint", f"checkpoint_{tag}.pt")
        others = [run.folder for run in runs if run is not first]
        more = ["--runs", *others] if others else []
        write_page(first.folder / checkpoint, first.about["data"], "test", page, *more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--scores", default="best", metavar="TAG", help="best, averageN, ...: scores.TAG.json"
    )
    shown = "what the picture shows (default: test BLEU, or test ppl)"
    parser.add_argument("--quality", metavar="COLUMN", help=shown)
    args = parser.parse_args()
    try:
        runs = [load(folder, args.scores) for folder in args.runs]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: {error.strerror}; train and score each run first") from None
    check(runs)
    rows = rows_of(runs)
    columns = [name for name in runs[0].values if all(name in run.values for run in runs)]
    if all(math.isnan(run.values[FFN_SECONDS]) for run in runs):
        columns.remove(FFN_SECONDS)
    quality = args.quality or ("test BLEU" if runs[0].about["task"] == "wmt" else "test ppl")
    if quality not in columns:
        raise FlagError(f"--quality must be one of {', '.join(columns)}, got {quality}")
    table = markdown(
        ["model", "runs", *columns],
        [[name, str(len(members)), *(cell(members, c) for c in columns)] for name, members in rows.items()],
    )
    everything = [{"run": str(r.folder), **r.about, "values": r.values, "curve": r.curve} for r in runs]
    publish(args.out / "compare", table, everything)
    timed = all(not math.isnan(run.values[FFN_SECONDS]) for run in runs)
    draw(rows, (FLOPS, FFN_SECONDS if timed else "training seconds"), quality, args.out / "compare.png")
    print(f"compare: {args.out}/compare.md, compare.json, compare.png")
    write_page_of(runs, args.scores, args.out / "compare.html")


if __name__ == "__main__":
    main()
