"""Hold out pairs of parallel text for valid and test, where they have no sets of their own.

In: cleaned pairs. Out: PREFIX.{train,valid,test}.{SOURCE,TARGET} (languages). Which pairs follows from a hash
of their sources, so most of them stay where they are when others come or go. Then training pairs are dropped
that nearly occur in valid or test, and valid ones that nearly occur in test. Memory: valid and test.
"""

from __future__ import annotations

import argparse
import heapq
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from counts import add_workers, check_workers, new_parser, report
from digests import digest
from near_duplicates import NearDuplicates, add_similarity, check_similarity
from outputs import atomic_writers, check_files
from parallel import in_order
from textio import DataError, in_chunks, read_parallel, run

SHARE = (
    20  # a twentieth of the text for either split, up to these numbers of pairs: choices, as are the next two
)
MOST = {"test": 1000, "valid": 500}
LONGEST = 400  # characters of a held-out side, so that any model's batch has room for it
CHUNK = 500  # pairs given to a process at once
Pair = tuple[str, str]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
    parser.add_argument("--out-prefix", type=Path, required=True)
    parser.add_argument("--splits", nargs="*", choices=MOST, default=[*MOST], help="default: both")
    add_similarity(parser)
    add_workers(parser)
    args = parser.parse_args()
    args.splits = [name for name in MOST if name in args.splits]
    check_workers(args)
    check_similarity(args)
    outputs = [Path(f"{args.out_prefix}.{s}.{x}") for s in ("train", *args.splits) for x in args.languages]
    check_files([*outputs, args.counts], [args.source, args.target])
    hold_out(args, outputs)


def choose(args: argparse.Namespace, read: int) -> dict[str, list[Pair]]:
    sizes = {name: min(MOST[name], read // SHARE) for name in args.splits}
    if 0 in sizes.values():
        raise DataError(
            f"{args.source}: {read} pairs are left after cleaning, too few to hold some out; give {SHARE} or "
            "more, or sets of your own for validation and test"
        )
    fitting = (pair for pair in read_parallel(args.source, args.target) if max(map(len, pair)) <= LONGEST)
    rest = heapq.nsmallest(sum(sizes.values()), fitting, key=lambda pair: digest(f"held out\t{pair[0]}"))
    chosen = {}
    for name, size in sizes.items():
        chosen[name], rest = rest[:size], rest[size:]
    return chosen


def hold_out(args: argparse.Namespace, outputs: list[Path]) -> None:
    counts = Counter({"read": sum(1 for _ in read_parallel(args.source, args.target)), "near duplicates": 0})
    chosen = choose(args, counts["read"])
    if len(chosen) == 2:
        near_test = NearDuplicates(chosen["test"], args.similarity)
        chosen["valid"] = [pair for pair in chosen["valid"] if pair not in near_test]
    near_any = NearDuplicates((pair for pairs in chosen.values() for pair in pairs), args.similarity)

    def far(pairs: list[Pair]) -> list[Pair]:
        return [pair for pair in pairs if pair not in near_any]

    with atomic_writers(outputs) as files:
        for number, (name, pairs) in enumerate(chosen.items(), 1):
            write(pairs, files[2 * number : 2 * number + 2], name, counts)
        for kept in in_order(far, in_chunks(read_parallel(args.source, args.target), CHUNK), args.workers):
            write(kept, files[:2], "train", counts)
        if empty := [name for name in ("train", *chosen) if not counts[name]]:
            raise DataError(
                f"{args.source}: no pair is left for {empty[0]}: all are nearly the same; give other text"
            )
        counts["near duplicates"] = counts["read"] - sum(counts[name] for name in ("train", *chosen))
    report(counts, args.counts)


def write(pairs: Iterable[Pair], files: list[TextIO], split: str, counts: Counter[str]) -> None:
    for pair in pairs:
        counts[split] += 1
        for file, side in zip(files, pair, strict=True):
            file.write(side + "\n")


if __name__ == "__main__":
    run(main)
