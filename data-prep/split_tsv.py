"""Take two columns of a tab-separated file (plain, .gz, .xz) as a pair of plain parallel files."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from counts import new_parser, report
from outputs import atomic_writers, check_files
from textio import DataError, read_lines, run


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--tsv", type=Path, required=True)
    parser.add_argument(
        "--columns",
        type=int,
        nargs=2,
        default=[4, 5],
        metavar=("SOURCE", "TARGET"),
        help="column numbers from 1 (default: 4 5, as in sample/en-de)",
    )
    parser.add_argument("--source-out", type=Path, required=True)
    parser.add_argument("--target-out", type=Path, required=True)
    parser.add_argument("--group-column", type=int, default=0, help="also count rows by this column")
    args = parser.parse_args()
    split(args)


def split(args: argparse.Namespace) -> None:
    if min(args.columns) < 1:
        raise DataError(f"--columns must be at least 1, got {min(args.columns)}")
    if args.group_column < 0:
        raise DataError(f"--group-column must be at least 0, got {args.group_column}")
    check_files([args.source_out, args.target_out, args.counts], [args.tsv])
    width = max(*args.columns, args.group_column)
    source_column, target_column = args.columns
    counts: Counter[str] = Counter(rows=0)
    with atomic_writers([args.source_out, args.target_out]) as (source, target):
        for number, line in enumerate(read_lines(args.tsv), 1):
            cells = line.split("\t")
            if len(cells) < width:
                raise DataError(f"{args.tsv}:{number}: {len(cells)} columns, column {width} is needed")
            source.write(cells[source_column - 1] + "\n")
            target.write(cells[target_column - 1] + "\n")
            counts["rows"] += 1
            if args.group_column:
                counts[cells[args.group_column - 1]] += 1
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
