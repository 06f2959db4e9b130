"""One table (Markdown and JSON) and one picture of runs that train.py trained and score.py scored.

    bash scripts/compare.sh RUN ... [FLAGS]          (SCORES=best|averageN, QUALITY=COLUMN, OUT=FOLDER)

Runs of one task on the same data. Runs that differ in the seed alone make one row: mean and, after ±,
standard deviation, of those of which a number is known. With --against MODEL, a row's name, also how much
better or worse each row is, seed by seed: per cent of perplexity, points of BLEU and chrF++. What
benchmark_checkpoints.sh and benchmarks.trained_models have measured is shown too, and takes the place of the
seconds of training, which other work on the machine disturbs, in the picture. Writes FOLDER/compare.md,
compare.json, compare.png, and compare.html: which experts the first run's tokens take (xmoe-explain).
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from experiments.explain import write_page
from experiments.plot_runs import draw
from experiments.results import mean_and_deviation, publish, read_json
from experiments.runs import (
    EXPERTS,
    TITLES,
    Rows,
    Run,
    changes,
    known,
    load_all,
    row_named,
    rows_of,
)
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import FlagError

DIGITS = {
    "updates": 0,
    "training seconds": 0,
    "s/update": 3,
    "parameters (M)": 1,
    "ms/decoded token": 3,
    "ms/sentence": 1,
}
COMPARED = ("bleu", "chrf++", "perplexity")


def cell(numbers: Sequence[float], digits: int = 2) -> str:
    return mean_and_deviation(numbers, digits) if numbers else "-"


def table(rows: Rows, columns: Sequence[str], split: str, against: str) -> str:
    """
    Args:
        against: a row's name; "" = none.
    """
    compared: list[str] = []
    if against:
        row_named("--against", against, rows)
        compared = [name for key in COMPARED if (name := f"{split} {TITLES[key]}") in rows[against][0].values]
    titles = [f"{c} against {against}{', %' * c.endswith('ppl')}" for c in compared]
    body = [
        [
            name, str(len(members)), *(cell(changes(members, rows[against], c)) for c in compared),
            *(cell(known(members, c), DIGITS.get(c, 2)) for c in columns),
        ]
        for name, members in rows.items()
    ]  # fmt: skip
    return markdown(["model", "runs", *titles, *columns], body)


def known_columns(runs: Sequence[Run]) -> list[str]:
    """Those that all runs have, and one at least has a number in."""
    common = [name for name in runs[0].values if all(name in run.values for run in runs)]
    return [name for name in common if known(runs, name)]


def one_of(flag: str, column: str, columns: Sequence[str]) -> str:
    """Raises FlagError."""
    if column not in columns:
        raise FlagError(f"{flag} must be one of {', '.join(columns)}, got {column}")
    return column


def write_page_of(runs: Sequence[Run], tag: str, split: str, page: Path) -> None:
    """Of the first run with experts, beside the others."""
    first = next((run for run in runs if not math.isnan(run.values[EXPERTS])), None)
    if first:
        checkpoint = read_json(first.folder / f"scores.{tag}.json").get("checkpoint", f"checkpoint_{tag}.pt")
        others = [run.folder for run in runs if run is not first]
        more = ["--runs", *others] if others else []
        write_page(first.folder / checkpoint, first.about["data"], split, page, *more)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN")
    add("--out", type=Path, required=True, help="folder to write")
    add("--scores", default="best", metavar="TAG", help="best, averageN, ...: scores.TAG.json")
    add("--split", default="test", help="whose routing is shown, and what --against compares")
    add("--against", default="", metavar="MODEL", help="with its flags, as the table names it")
    add("--columns", nargs="+", default=[], metavar="COLUMN", help="of the table (default: all)")
    add("--quality", metavar="COLUMN", help="what the picture shows (default: BLEU, or ppl)")
    add("--plot", nargs="+", default=[], metavar="MODEL", help="those in the picture (default: all)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    runs = load_all(args.runs, args.scores, args.split)
    rows, columns = rows_of(runs), known_columns(runs)
    best = "BLEU" if runs[0].about["task"] == "wmt" else "ppl"
    quality = one_of("--quality", args.quality or f"{args.split} {best}", columns)
    shown = [one_of("--columns", column, columns) for column in args.columns] or columns
    text = table(rows, shown, args.split, args.against)
    publish(args.out / "compare", text, [{"run": str(r.folder), **r.about, "values": r.values} for r in runs])
    drawn = {name: row_named("--plot", name, rows) for name in args.plot or rows}
    draw(drawn, quality, args.out / "compare.png")
    print(f"compare: {args.out}/compare.md, compare.json, compare.png")
    write_page_of(runs, args.scores, args.split, args.out / "compare.html")


if __name__ == "__main__":
    main()
