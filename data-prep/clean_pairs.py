"""Clean parallel text: pairs of files in, one pair of files out, in the same order.

Each side is normalised (NFC, invisible characters away, whitespace runs to one space). Then pairs are
dropped for the first of these reasons that holds, and every reason is counted: an empty side, a character
U+FFFD, too many words, lengths out of proportion, a side that occurs in a held-out file, a pair seen before.
Memory does not grow with the text but for a bit a pair and 14 to 27 bytes a held-out line; on the disk, what
is left waits beside the output until the duplicates are known.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from counts import add_workers, check_workers, new_parser, report
from digests import DigestLog, DigestSet, copy_first, digest
from outputs import atomic_writers, check_files, scratch
from parallel import in_order
from textio import DataError, in_chunks, normalize, read_lines, read_parallel, run

CHUNK = 2000  # pairs given to a process at once
REASONS = ("empty side", "not decoded", "too long", "length ratio", "in held-out text", "duplicate")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--source", type=Path, nargs="+", required=True, help="one file or more, in order")
    parser.add_argument("--target", type=Path, nargs="+", required=True, help="as many, parallel to --source")
    parser.add_argument("--source-out", type=Path, required=True)
    parser.add_argument("--target-out", type=Path, required=True)
    parser.add_argument(
        "--max-words", type=int, default=250, help="of a side, between white space (default: %(default)s)"
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        default=4.0,
        help="how many times longer one side may be, in characters, 10 added to both so that "
        "short labels may differ (default: %(default)s; 0 = no limit)",
    )
    parser.add_argument(
        "--target-chars",
        type=number_or_auto,
        default=1.0,
        help="target characters expected for one source character, e.g. 0.3 for English to "
        "Chinese; auto: as many as in the whole text (default: %(default)s)",
    )
    parser.add_argument(
        "--heldout-source",
        type=Path,
        nargs="*",
        default=[],
        help="validation and test sources: training pairs with such a source are dropped",
    )
    parser.add_argument("--heldout-target", type=Path, nargs="*", default=[], help="the same for targets")
    parser.add_argument(
        "--normalize-only",
        action="store_true",
        help="for validation and test sets: drop nothing; an empty side is an error",
    )
    add_workers(parser)
    args = parser.parse_args()
    check(args)
    (normalize_only if args.normalize_only else clean)(args)


def number_or_auto(text: str) -> float | None:
    return None if text == "auto" else float(text)


def check(args: argparse.Namespace) -> None:
    check_workers(args)
    inputs = (*args.source, *args.target, *args.heldout_source, *args.heldout_target)
    check_files([args.source_out, args.target_out, args.counts], inputs)
    if len(args.source) != len(args.target):
        raise DataError(f"--source has {len(args.source)} files and --target {len(args.target)}; give pairs")
    if args.max_words < 1:
        raise DataError(f"--max-words must be at least 1, got {args.max_words}")
    if args.max_ratio != 0 and not args.max_ratio >= 1:  # nor NaN
        raise DataError(f"--max-ratio must be 0 (no limit) or at least 1, got {args.max_ratio}")
    if args.target_chars is not None and not 0 < args.target_chars < math.inf:
        raise DataError(f"--target-chars must be above 0, got {args.target_chars}")


def heldout(paths: list[Path]) -> DigestSet:
    """Held-out lines, compared without case: 'Save' in the test set is known from 'save'."""
    seen = DigestSet()
    for path in paths:
        for line in read_lines(path):
            seen.add(digest(normalize(line).casefold()))
    return seen


def all_pairs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    return (pair for paths in zip(args.source, args.target, strict=True) for pair in read_parallel(*paths))


class Filter:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.target_chars = args, args.target_chars
        if self.target_chars is None:
            characters = [1, 1]
            for source, target in all_pairs(args):
                characters[0] += len(source)
                characters[1] += len(target)
            self.target_chars = characters[1] / characters[0]
        self.heldout = heldout(args.heldout_source), heldout(args.heldout_target)

    def reason_to_drop(self, source: str, target: str) -> str | None:
        args = self.args
        if not source or not target:
            return "empty side"
        if "\ufffd" in source or "\ufffd" in target:  # where somebody read text in the wrong encoding
            return "not decoded"
        if max(source.count(" "), target.count(" ")) >= args.max_words:
            return "too long"
        ratio = (len(target) + 10) / (len(source) * self.target_chars + 10)
        if args.max_ratio and not 1 / args.max_ratio <= ratio <= args.max_ratio:
            return "length ratio"
        if any(
            digest(side.casefold()) in known
            for side, known in zip((source, target), self.heldout, strict=True)
        ):
            return "in held-out text"
        return None

    def clean(self, pairs: list[tuple[str, str]]) -> tuple[Counter[str], list[tuple[str, str, int]]]:
        """What was dropped and why; what is left, with a digest of each pair."""
        dropped: Counter[str] = Counter()
        left = []
        for pair in pairs:
            source, target = map(normalize, pair)
            if reason := self.reason_to_drop(source, target):
                dropped[reason] += 1
            else:
                left.append((source, target, digest(f"{source}\t{target}")))
        return dropped, left


def clean(args: argparse.Namespace) -> None:
    counts = Counter({"read": 0, "kept": 0} | dict.fromkeys(REASONS, 0))
    rules = Filter(args)
    with scratch(args.source_out) as work:
        log = DigestLog(work / "digests")
        sides = work / "source", work / "target"
        with atomic_writers(sides) as files:
            for dropped, left in in_order(rules.clean, in_chunks(all_pairs(args), CHUNK), args.workers):
                counts.update(dropped)
                counts["read"] += len(left) + dropped.total()
                for file, lines in zip(files, zip(*left, strict=True), strict=False):  # the third are digests
                    file.write("\n".join(lines) + "\n")
                log.add([value for _, _, value in left])
        bits = log.repeated()
        with atomic_writers([args.source_out, args.target_out]) as files:
            for side, file in zip(sides, files, strict=True):
                counts["kept"] = sum(1 for _ in copy_first(side, file, bits))
            counts["duplicate"] = counts["read"] - sum(counts[name] for name in counts if name != "read")
            if not counts["kept"]:
                raise DataError(f"{args.source[0]}: no pair is left after cleaning ({dict(counts)})")
    report(counts, args.counts)


def normalize_only(args: argparse.Namespace) -> None:
    """Held-out text: it is small, and every pair of it stays."""
    counts = Counter({"read": 0, "kept": 0})
    with atomic_writers([args.source_out, args.target_out]) as (source_out, target_out):
        for paths in zip(args.source, args.target, strict=True):
            for number, pair in enumerate(read_parallel(*paths), 1):
                sides = source, target = tuple(map(normalize, pair))
                if not all(sides):
                    raise DataError(
                        f"{paths[0] if target else paths[1]}:{number}: empty side; "
                        "validation and test sets are never cut, so fix the line"
                    )
                counts.update(("read", "kept"))
                source_out.write(source + "\n")
                target_out.write(target + "\n")
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
