"""Drop the paragraphs of training documents that nearly occur in held-out ones.

In and out: a paragraph a line, an empty line after each document. Memory: the held-out text.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from counts import add_workers, check_workers, new_parser, report
from near_duplicates import NearDuplicates, add_similarity, check_similarity
from outputs import atomic_writers, check_files
from parallel import in_order
from textio import DataError, in_chunks, read_lines, run

CHUNK = 500  # paragraphs given to a process at once


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    add_similarity(parser)
    add_workers(parser)
    args = parser.parse_args()
    check_workers(args)
    check_files([args.output, args.counts], [args.input, *args.held_out])
    check_similarity(args)
    drop(args)


def drop(args: argparse.Namespace) -> None:
    held_out = [(line,) for path in args.held_out for line in read_lines(path) if line.strip()]
    if not held_out:
        raise DataError(f"{args.held_out[0]}: empty lines only; expected text")
    near = NearDuplicates(held_out, args.similarity)
    counts = Counter({"paragraphs": 0, "near duplicates": 0, "kept": 0, "words": 0})

    def mark(lines: list[str]) -> list[tuple[str, bool]]:
        return [(line, bool(line) and (line,) in near) for line in lines]

    begun = False  # a document of which nothing is left leaves no empty line either
    with atomic_writers([args.output]) as (output,):
        for chunk in in_order(mark, in_chunks(read_lines(args.input), CHUNK), args.workers):
            for line, is_near in chunk:
                if line:
                    counts["paragraphs"] += 1
                    counts["near duplicates"] += is_near
                if is_near or not (line or begun):
                    continue
                output.write(line + "\n")
                begun = bool(line)
                if line:
                    counts["kept"] += 1
                    counts["words"] += len(line.split())
        if not counts["kept"]:
            raise DataError(f"{args.input}: every paragraph nearly occurs in {args.held_out[0]} or its like")
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
