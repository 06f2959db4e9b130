"""Take a fixed random sample of parallel lines, in their order (reservoir: memory holds the sample only)."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

from counts import new_parser, report
from outputs import atomic_writers, check_files
from textio import DataError, read_parallel, run


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--source-out", type=Path, required=True)
    parser.add_argument("--target-out", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True, help="pairs to take; all if there are fewer")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    check_files([args.source_out, args.target_out, args.counts], [args.source, args.target])
    if args.size < 1:
        raise DataError(f"--size must be at least 1, got {args.size}")
    sample(args)


def sample(args: argparse.Namespace) -> None:
    generator = random.Random(args.seed)
    kept: list[tuple[int, tuple[str, str]]] = []
    counts = Counter({"read": 0, "kept": 0})
    for number, pair in enumerate(read_parallel(args.source, args.target)):
        counts["read"] += 1
        if number < args.size:
            kept.append((number, pair))
        elif (slot := generator.randrange(number + 1)) < args.size:
            kept[slot] = (number, pair)
    with atomic_writers([args.source_out, args.target_out]) as (source, target):
        for _, (a, b) in sorted(kept):
            source.write(a + "\n")
            target.write(b + "\n")
    counts["kept"] = len(kept)
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
