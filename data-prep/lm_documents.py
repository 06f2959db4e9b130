"""Split documents into train, valid and test for a language model; a document is never cut.

In: one paragraph a line, an empty line between documents. Out: the same form, PREFIX.{train,valid,test}.
Each line is normalised (NFC, invisible characters away, whitespace runs to one space). A document's
split follows from a hash of its text, so it does not move when other documents come or go; documents
seen before are dropped. Memory: the largest document, and 14 to 27 MB for a million documents.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from counts import new_parser, report
from digests import DigestSet, digest
from textio import DataError, atomic_writers, normalize, read_lines, run

SPLITS = ("train", "valid", "test")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="plain, .gz or .xz, in order")
    parser.add_argument("--out-prefix", type=Path, required=True)
    parser.add_argument("--valid-percent", type=float, default=5.0, help="of documents (default: 5)")
    parser.add_argument("--test-percent", type=float, default=5.0, help="of documents (default: 5)")
    parser.add_argument(
        "--min-words", type=int, default=1, help="drop documents with fewer words (default: %(default)s)"
    )
    args = parser.parse_args()
    for flag, percent in (("--valid-percent", args.valid_percent), ("--test-percent", args.test_percent)):
        if not 0 < percent < 50:
            raise DataError(f"{flag} must be between 0 and 50, got {percent}")
    split(args)


def documents(lines: Iterable[str]) -> Iterator[list[str]]:
    paragraphs: list[str] = []
    for line in lines:
        if text := normalize(line):
            paragraphs.append(text)
        elif paragraphs:
            yield paragraphs
            paragraphs = []
    if paragraphs:
        yield paragraphs


def choose(value: int, valid_percent: float, test_percent: float) -> str:
    place = 100 * value / 2**64
    if place < test_percent:
        return "test"
    return "valid" if place < test_percent + valid_percent else "train"


def split(args: argparse.Namespace) -> None:
    counts = Counter({"documents": 0, "too short": 0, "duplicate": 0, "train": 0, "valid": 0, "test": 0})
    seen = DigestSet()
    with atomic_writers([Path(f"{args.out_prefix}.{name}") for name in SPLITS]) as opened:
        files = dict(zip(SPLITS, opened, strict=True))
        for path in args.input:
            for paragraphs in documents(read_lines(path)):
                counts["documents"] += 1
                text = "\n".join(paragraphs)
                if len(text.split()) < args.min_words:
                    counts["too short"] += 1
                elif not seen.add(value := digest(text)):
                    counts["duplicate"] += 1
                else:
                    name = choose(value, args.valid_percent, args.test_percent)
                    counts[name] += 1
                    counts[f"{name} paragraphs"] += len(paragraphs)
                    counts[f"{name} words"] += len(text.split())
                    files[name].write(text + "\n\n")
        for name in SPLITS:
            if not counts[name]:
                raise DataError(
                    f"{args.input[0]}: no document falls into {name} ({counts['documents']} "
                    "read); give more documents or a larger share"
                )
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
