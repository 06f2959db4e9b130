"""The table of docs/routers.md: runs of one task that differ in how a token chooses experts. See routers.sh.

    python scripts/run.py experiments.compare_routers RUN ... --split test --out FILE

Means over seeds, after ± the standard deviation. Perplexity is compared with the reference's, seed by seed;
seconds are those that benchmarks.trained_models has noted of one seed. Writes FILE.md, FILE.json.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.compare import FLOPS, load, rows_of
from experiments.plot_runs import Run
from experiments.results import mean_and_deviation, publish, read, read_json
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import UserError

REFERENCE = "topk-s4 --moe-topk 2"
MAX_VIOLATION, DEAD = "max violation", "dead experts, %"
SPEEDS = {"update": "update / dense", "decoding": "decoded token / dense"}


def loads(run: Path) -> dict[str, float]:
    """Of the text of the last validation: the layers' means. Empty for a dense model."""
    file = run / "moe_load.jsonl"
    records = [json.loads(line) for line in read(file).splitlines()] if file.exists() else []
    layers = [*records[-1]["layers"].values()] if records else []
    if not layers:
        return {}
    return {
        MAX_VIOLATION: statistics.mean(layer["max_violation"] for layer in layers),
        DEAD: 100 * statistics.mean(layer["dead_experts"] / len(layer["rows"]) for layer in layers),
    }


def speeds(runs: Sequence[Run]) -> list[str]:
    noted = [run.folder / "speed.json" for run in runs]
    found = [read_json(path) for path in noted if path.exists()]
    return [f"{found[0][what]['ratio']:.2f}" if found else "-" for what in SPEEDS]


def against(runs: Sequence[Run], reference: Sequence[Run], quality: str) -> str:
    """Per cent of perplexity, pair by pair of seeds."""
    bases = {run.about["seed"]: run.values[quality] for run in reference}
    changes = [
        100 * (r.values[quality] / bases[r.about["seed"]] - 1) for r in runs if r.about["seed"] in bases
    ]
    return mean_and_deviation(changes, 1) if changes else "-"


def cells(runs: Sequence[Run], columns: Sequence[str]) -> list[str]:
    """'-' where no run has the column."""
    values = [[run.values[column] for run in runs if column in run.values] for column in columns]
    return [mean_and_deviation(numbers, 2) if numbers else "-" for numbers in values]


def table(runs: Sequence[Run], split: str) -> str:
    quality = f"{split} ppl"
    rows = rows_of(list(runs))
    if REFERENCE not in rows:
        raise UserError(f"RUN must have one of {REFERENCE}, with which the others are compared")
    scores = [f"{split} {name}" for name in ("BLEU", "chrF++") if f"{split} {name}" in runs[0].values]
    columns = [quality, *scores, "experts/token", FLOPS, MAX_VIOLATION, DEAD]
    titles = ["model", "runs", "ppl against top-k, %", *columns, *SPEEDS.values()]
    body = [
        [
            name,
            str(len(group)),
            against(group, rows[REFERENCE], quality),
            *cells(group, columns),
            *speeds(group),
        ]
        for name, group in rows.items()
    ]
    return markdown(titles, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--split", required=True, help="whose scores are shown")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write, without .md")
    args = parser.parse_args()
    runs: list[Run] = []
    for folder in args.runs:
        run = load(folder, "best", args.split)
        run.values.update(loads(folder))
        runs.append(run)
    everything: list[dict[str, Any]] = [{"run": str(r.folder), **r.about, "values": r.values} for r in runs]
    publish(args.out, table(runs, args.split), everything)


if __name__ == "__main__":
    main()
