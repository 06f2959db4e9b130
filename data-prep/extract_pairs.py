"""Extract English and another language from unpacked packages as clean, unique sentence pairs.

In: the JSON file of fetch_packages.py. Out: tab-separated source, document, kind (prose or ui), English,
other language. No side occurs twice (case apart); of pairs with the same side the first is kept. Memory:
the largest document, the translated package descriptions, and 30 to 60 MB for a million pairs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from counts import new_parser, report
from digests import DigestSet, digest
from languages import Language, language
from pair_rules import REASONS, anchors_agree, clean, reason_to_refuse, sentences
from parallel_sources import Found, Tree, find_all
from textio import DataError, atomic_writers, run


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="JSON file of fetch_packages.py")
    parser.add_argument("--folder", type=Path, required=True, help="its --folder")
    parser.add_argument("--lang", required=True, help="the language beside English")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    extract(args, language(args.lang))


def tree(sources: Path, folder: Path) -> Tree:
    entries = json.loads(sources.read_text("utf-8"))
    for entry in entries:
        if not (folder / entry["folder"]).is_dir():
            raise DataError(f"{folder / entry['folder']}: folder is missing; run fetch_packages.py again")
    packages = [entry for entry in entries if "version" in entry]
    (indexes,) = (entry for entry in entries if "version" not in entry)
    return Tree(
        packages={entry["name"]: folder / entry["folder"] for entry in packages},
        indexes=folder / indexes["folder"],
        sources={entry["name"]: entry["source"] for entry in packages},
    )


def extract(args: argparse.Namespace, other: Language) -> None:
    with atomic_writers([args.output]) as (file,):
        counts = Counter({"found": 0, "kept": 0, **dict.fromkeys((*REASONS, "duplicate"), 0)})
        for row in unique_pairs(find_all(tree(args.sources, args.folder), other), other, counts):
            counts[row.source] += 1
            file.write("\t".join(row) + "\n")
        if not counts["kept"]:
            raise DataError(f"{args.sources}: no pair of English and {other.code} in these packages")
    report(counts, args.counts)


def unique_pairs(found: Iterable[Found], other: Language, counts: Counter[str]) -> Iterable[Found]:
    seen = DigestSet(), DigestSet()
    for row in found:
        for raw in sentences(row.english, row.other, other):
            counts["found"] += 1
            source, target = clean(*raw)
            structural = row.kind == "prose"  # paired by place, not by translators' files
            reason = reason_to_refuse(source, target, other)
            if reason is None and structural and not anchors_agree(source, target):
                reason = "anchors differ"
            if reason is None and not is_new(source, target, seen):
                reason = "duplicate"
            counts[reason or "kept"] += 1
            if reason is None:
                yield row._replace(english=source, other=target)


def is_new(source: str, target: str, seen: tuple[DigestSet, DigestSet]) -> bool:
    a, b = digest(source.casefold()), digest(target.casefold())
    return a not in seen[0] and b not in seen[1] and seen[0].add(a) and seen[1].add(b)


if __name__ == "__main__":
    run(main)
