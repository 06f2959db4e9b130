"""Split pairs into train, valid and test by document group, so that the test is new to the model.

In: the tab-separated file of extract_pairs.py. Out: PREFIX.{train,valid,test}.{en,LANG}. Whole groups are
held out, in an order that follows from a hash of their names: prose and, for the rest, messages. A group
that would be more than an eighth of a split is for training. Of a held-out group only pairs of 3 to 60
words are used. Then training pairs are dropped that nearly occur in valid or test, and valid ones that
nearly occur in test. Memory: the names of the groups, valid and test.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from counts import add_workers, check_workers, new_parser, report
from digests import digest
from near_duplicates import NearDuplicates, add_similarity, check_similarity
from outputs import atomic_writers, check_files
from parallel import in_order
from textio import DataError, in_chunks, read_lines, run

Row = tuple[str, str, str, str, str]  # source, group, kind, English, other
LARGEST_GROUP = 1 / 8  # of a split: a choice
CHUNK = 500  # pairs given to a process at once


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--lang", required=True, help="suffix of the other side's files")
    parser.add_argument("--out-prefix", type=Path, required=True)
    parser.add_argument("--valid", type=int, default=1000, help="about so many pairs (default: %(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="about so many pairs (default: %(default)s)")
    parser.add_argument(
        "--prose-percent", type=float, default=70.0, help="of valid and test, the rest messages (default: 70)"
    )
    parser.add_argument("--min-words", type=int, default=3, help="of a held-out pair (default: %(default)s)")
    parser.add_argument("--max-words", type=int, default=60, help="of a held-out pair (default: %(default)s)")
    add_similarity(parser)
    add_workers(parser)
    args = parser.parse_args()
    check_workers(args)
    for flag in ("valid", "test"):
        if getattr(args, flag) < 1:
            raise DataError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    check_similarity(args)
    if not 0 <= args.prose_percent <= 100:
        raise DataError(f"--prose-percent must be in 0 to 100, got {args.prose_percent}")
    check_files([*output_names(args), args.counts], [args.input])
    split(args)


class Splitter:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.groups: Counter[tuple[str, str]] = Counter()  # (kind, group): pairs that could be held out
        for row in self.rows():
            self.groups[row[2], row[1]] += self.fits(row)
        # The smaller of the two first: fewer groups are small enough for it.
        self.valid = self.choose("valid", args.valid, set())
        self.test = self.choose("test", args.test, self.valid)

    def rows(self) -> Iterator[Row]:
        for number, line in enumerate(read_lines(self.args.input), 1):
            cells = line.split("\t")
            if len(cells) != 5:
                raise DataError(f"{self.args.input}:{number}: {len(cells)} columns, expected 5")
            yield (cells[0], cells[1], cells[2], cells[3], cells[4])

    def fits(self, row: Row) -> bool:
        return bool(self.args.min_words <= len(row[3].split()) <= self.args.max_words)

    def choose(self, name: str, size: int, taken: set[str]) -> set[str]:
        """Groups in hash order until there are enough pairs of prose, then messages for the rest."""
        chosen: set[str] = set()
        order = sorted(self.groups, key=lambda key: digest(f"{name}\t{key[1]}"))
        filled = 0
        for kinds, goal in (
            ({"prose"}, size * self.args.prose_percent / 100),
            ({"ui"}, size),
            ({"prose", "ui"}, size),
        ):
            for kind, group in order:
                if kind not in kinds or group in taken or group in chosen:
                    continue
                pairs = self.groups[kind, group]
                if 0 < pairs <= size * LARGEST_GROUP and filled < goal:
                    chosen.add(group)
                    filled += pairs
        if not filled:
            raise DataError(
                f"{self.args.input}: no document group is small enough to hold out for {name} (at most "
                f"{size * LARGEST_GROUP:.0f} pairs of --{name} {size}); ask for more"
            )
        return chosen

    def held_out(self, groups: set[str]) -> Iterator[Row]:
        return (row for row in self.rows() if row[1] in groups and self.fits(row))


def output_names(args: argparse.Namespace) -> list[Path]:
    return [Path(f"{args.out_prefix}.{s}.{x}") for s in ("train", "valid", "test") for x in ("en", args.lang)]


def split(args: argparse.Namespace) -> None:
    splitter = Splitter(args)
    counts = Counter({"read": sum(1 for _ in splitter.rows()), "groups": len(splitter.groups)})
    counts.update(
        {"test groups": len(splitter.test), "valid groups": len(splitter.valid), "near duplicates": 0}
    )
    test = list(splitter.held_out(splitter.test))
    near_test = NearDuplicates((row[3:] for row in test), args.similarity)
    valid = [row for row in splitter.held_out(splitter.valid) if row[3:] not in near_test]
    near_any = NearDuplicates((row[3:] for row in (*test, *valid)), args.similarity)
    with atomic_writers(output_names(args)) as files:
        for row in test:
            write(row, files[4:], "test", counts)
        for row in valid:
            write(row, files[2:4], "valid", counts)

        def mark(rows: list[Row]) -> list[tuple[Row, bool]]:
            return [(row, row[3:] in near_any) for row in rows]

        held = splitter.test | splitter.valid
        rest = (row for row in splitter.rows() if row[1] not in held)
        for chunk in in_order(mark, in_chunks(rest, CHUNK), args.workers):
            for row, is_near in chunk:
                if is_near:
                    counts["near duplicates"] += 1
                else:
                    write(row, files[:2], "train", counts)
        if not (counts["train"] and counts["valid"]):
            raise DataError(f"{args.input}: a split is empty ({dict(counts)}); lower --test and --valid")
    report(counts, args.counts)


def write(row: Row, files: list[TextIO], split_name: str, counts: Counter[str]) -> None:
    counts[split_name] += 1
    counts[f"{split_name} {row[2]}"] += 1
    counts[f"{split_name} English words"] += len(row[3].split())
    for file, side in zip(files, row[3:], strict=True):
        file.write(side + "\n")


if __name__ == "__main__":
    run(main)
