"""Encode files with a sentencepiece model, one line at a time, pieces separated by spaces.

Several inputs are parallel: with --max-pieces a line is dropped from all of them if any side is longer.
Empty lines stay (in a language model's text they end a document). More outputs than inputs are shards: the
lines, or of a single input the documents, are dealt out to them in turn.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import sentencepiece
from counts import add_workers, check_workers, new_parser, report
from outputs import atomic_writers, check_files
from parallel import in_order
from textio import DataError, in_chunks, read_lines, read_parallel, run

CHUNK = 2000  # lines given to a process at once
Encoder = Callable[[str], list[str]]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    add_arguments(parser)
    args = parser.parse_args()
    check(args, args.model)
    processor = load(args.model)
    unknown = processor.id_to_piece(processor.unk_id())
    encode(args, lambda line: processor.id_to_piece(processor.encode(line, out_type=int)), unknown)


def add_arguments(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    parser.add_argument(
        "--input", type=Path, nargs="+", required=needed, help="one file, or two parallel ones"
    )
    parser.add_argument(
        "--output",
        type=Path,
        nargs="+",
        required=needed,
        help="as many as --input for each shard, shard by shard",
    )
    parser.add_argument(
        "--max-pieces",
        type=int,
        default=0,
        help="drop longer lines; for training text only (default: 0 = keep all)",
    )
    add_workers(parser)


def check(args: argparse.Namespace, *pieces: Path) -> None:
    """`pieces`: files that say how a word is cut."""
    check_workers(args)
    check_files([*args.output, args.counts], [*args.input, *pieces])
    if len(args.output) % len(args.input) or len(args.input) > 2:
        raise DataError(
            f"--input has {len(args.input)} files and --output {len(args.output)}; give one or two inputs, "
            "and as many outputs or a multiple"
        )
    if args.max_pieces < 0:
        raise DataError(f"--max-pieces must be at least 0, got {args.max_pieces}")


def rows(paths: list[Path]) -> Iterator[tuple[str, ...]]:
    if len(paths) == 2:
        yield from read_parallel(*paths)
    else:
        yield from ((line,) for line in read_lines(paths[0]))


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    refused = DataError(f"{path}: not a sentencepiece model; make one with train_spm.py")
    model = path.read_bytes()
    if not model:  # sentencepiece takes it for no model given
        raise refused
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise refused from None


def encode(args: argparse.Namespace, encode_line: Encoder, unknown: str) -> None:
    def work(chunk: list[tuple[str, ...]]) -> tuple[Counter[str], list[tuple[str, ...]]]:
        counts, kept = Counter({"read": len(chunk)}), []
        for row in chunk:
            sides = [encode_line(line) for line in row]
            if args.max_pieces and max(map(len, sides)) > args.max_pieces:
                counts["too long"] += 1
                continue
            counts["kept"] += 1
            counts["pieces"] += sum(map(len, sides))
            counts["unknown"] += sum(side.count(unknown) for side in sides)
            kept.append(tuple(" ".join(side) for side in sides))
        return counts, kept

    counts = Counter({"read": 0, "kept": 0, "too long": 0, "pieces": 0, "unknown": 0})
    sides = len(args.input)
    shard, written = 0, Counter[TextIO]()
    with atomic_writers(args.output) as files:
        for counted, kept in in_order(work, in_chunks(rows(args.input), CHUNK), args.workers):
            counts.update(counted)
            for row in kept:
                for file, pieces in zip(files[shard : shard + sides], row, strict=True):
                    file.write(pieces + "\n")
                    written[file] += 1
                if sides == 2 or not row[0]:
                    shard = (shard + sides) % len(files)
        if empty := [str(path) for path, file in zip(args.output, files, strict=True) if not written[file]]:
            raise DataError(f"nothing is left for {', '.join(empty)} ({dict(counts)}); fewer shards?")
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
