"""Encode files with a sentencepiece model, one line at a time, pieces separated by spaces.

Several inputs are parallel: with --max-pieces a line is dropped from all of them if any side is longer.
Empty lines stay (in a language model's text they end a document).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import sentencepiece
from counts import new_parser, report
from textio import DataError, atomic_writers, read_lines, read_parallel, run

CHUNK = 2000  # lines handed to sentencepiece at once, so that its threads have work


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="one file, or two parallel ones")
    parser.add_argument("--output", type=Path, nargs="+", required=True, help="as many as --input")
    parser.add_argument(
        "--max-pieces",
        type=int,
        default=0,
        help="drop longer lines; for training text only (default: 0 = keep all)",
    )
    parser.add_argument("--threads", type=int, default=1, help="same result with any (default: %(default)s)")
    args = parser.parse_args()
    if len(args.input) != len(args.output) or len(args.input) > 2:
        raise DataError(
            f"--input has {len(args.input)} files and --output {len(args.output)}; give one or two of each"
        )
    if args.max_pieces < 0:
        raise DataError(f"--max-pieces must be at least 0, got {args.max_pieces}")
    encode(args)


def rows(paths: list[Path]) -> Iterator[tuple[str, ...]]:
    if len(paths) == 2:
        yield from read_parallel(*paths)
    else:
        yield from ((line,) for line in read_lines(paths[0]))


def load(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise DataError(f"{path}: not a sentencepiece model; make one with train_spm.py") from None


def encode(args: argparse.Namespace) -> None:
    processor = load(args.model)
    unknown = processor.unk_id()
    counts = Counter({"read": 0, "kept": 0, "too long": 0, "pieces": 0, "unknown": 0})
    stream = rows(args.input)
    with atomic_writers(args.output) as files:
        while chunk := list(islice(stream, CHUNK)):
            sides = [
                processor.encode(list(side), out_type=int, num_threads=args.threads)
                for side in zip(*chunk, strict=True)
            ]
            for row in zip(*sides, strict=True):
                counts["read"] += 1
                if args.max_pieces and max(map(len, row)) > args.max_pieces:
                    counts["too long"] += 1
                    continue
                counts["kept"] += 1
                for file, ids in zip(files, row, strict=True):
                    counts["pieces"] += len(ids)
                    counts["unknown"] += ids.count(unknown)
                    file.write(" ".join(processor.id_to_piece(ids)) + "\n")
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
