"""Extract English and another language from unpacked packages as clean, unique sentence pairs.

In: the JSON file of fetch_packages.py. Out: tab-separated source, document group, kind (prose or ui),
English, other language. No side occurs twice (case apart); of pairs with the same side the first is kept.
Memory: the largest document, the translated package descriptions, and 30 to 60 MB for a million pairs.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from counts import add_workers, check_workers, new_parser, report
from digests import DigestSet, digest
from languages import Language, language
from outputs import atomic_writers, check_files
from pair_rules import REASONS, anchors_agree, clean, reason_to_refuse, sentences
from parallel import in_order
from parallel_sources import Part, Tree, find_all
from textio import DataError, in_chunks, read_entries, run

CHUNK = 20  # documents given to a process at once


class Row(NamedTuple):
    source: str
    group: str
    kind: str
    english: str
    other: str


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="JSON file of fetch_packages.py")
    parser.add_argument("--folder", type=Path, required=True, help="its --folder")
    parser.add_argument("--lang", required=True, help="the language beside English")
    parser.add_argument("--output", type=Path, required=True)
    add_workers(parser)
    args = parser.parse_args()
    check_workers(args)
    check_files([args.output, args.counts], [args.sources])
    extract(args, language(args.lang))


def tree(sources: Path, folder: Path) -> Tree:
    entries = read_entries(sources, "name", "folder")
    for entry in entries:
        if not (folder / entry["folder"]).is_dir():
            raise DataError(f"{folder / entry['folder']}: folder is missing; run fetch_packages.py again")
    packages = [entry for entry in entries if "version" in entry]
    indexes = [entry for entry in entries if "version" not in entry]
    if len(indexes) != 1 or not all("source" in entry for entry in packages):
        raise DataError(f"{sources}: not the JSON file of fetch_packages.py; run it again")
    return Tree(
        packages={entry["name"]: folder / entry["folder"] for entry in packages},
        indexes=folder / indexes[0]["folder"],
        sources={entry["name"]: entry["source"] for entry in packages},
    )


def extract(args: argparse.Namespace, other: Language) -> None:
    counts = Counter({"broken files": 0, "found": 0, "kept": 0, **dict.fromkeys((*REASONS, "duplicate"), 0)})
    seen = DigestSet(), DigestSet()
    chunks = in_chunks(find_all(tree(args.sources, args.folder), other), CHUNK)
    with atomic_writers([args.output]) as (file,):
        for counted, rows in in_order(partial(read_parts, other), chunks, args.workers):
            counts.update(counted)
            for row in rows:
                if not is_new(row.english, row.other, seen):
                    counts["duplicate"] += 1
                    continue
                counts["kept"] += 1
                counts[row.source] += 1
                file.write("\t".join(row) + "\n")
        if not counts["kept"]:
            raise DataError(f"{args.sources}: no pair of English and {other.code} in these packages")
    report(counts, args.counts)


def read_parts(other: Language, parts: list[Part]) -> tuple[Counter[str], list[Row]]:
    counts: Counter[str] = Counter()
    rows = []
    for part in parts:
        try:
            found = list(part.read(*part.arguments))
        except DataError as error:  # one broken file among thousands
            print(f"{error}; left out", file=sys.stderr)
            counts["broken files"] += 1
            continue
        for raw in found:
            for pair in sentences(*raw, other):
                counts["found"] += 1
                source, target = clean(*pair)
                reason = reason_to_refuse(source, target, other)
                if reason is None and part.kind == "prose" and not anchors_agree(source, target):
                    reason = "anchors differ"
                if reason is None:
                    rows.append(Row(part.source, part.group, part.kind, source, target))
                else:
                    counts[reason] += 1
    return counts, rows


def is_new(source: str, target: str, seen: tuple[DigestSet, DigestSet]) -> bool:
    a, b = digest(source.casefold()), digest(target.casefold())
    return a not in seen[0] and b not in seen[1] and seen[0].add(a) and seen[1].add(b)


if __name__ == "__main__":
    run(main)
