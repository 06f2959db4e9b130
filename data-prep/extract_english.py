"""Extract English prose from the docstrings of installed Python packages, and from unpacked Debian ones.

Out: a paragraph a line, an empty line between documents (files); a paragraph occurs once in all of them.
Memory: the largest document, and 14 to 27 MB for a million paragraphs.
"""

from __future__ import annotations

import argparse
import html
import importlib.metadata
import importlib.util
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from counts import new_parser, report
from digests import DigestSet, digest
from formats.docstrings import read_docstrings
from formats.manpage import read_manpage
from formats.markup import read_docbook, read_html
from formats.plain import read_glosses, read_pod, read_text
from textio import DataError, atomic_writers, normalize, read_lines, run, write_bytes

Document = tuple[str, Iterable[str]]  # source, paragraphs
STANDARD_LIBRARY = "python"
READERS: dict[str, Callable[[Path], Iterable[str]]] = {
    "html": lambda path: (block.text for block in read_html(path)),
    "docbook": lambda path: (block.text for block in read_docbook(path)),
    "man": lambda path: (block.text for block in read_manpage(path)),
    "pod": read_pod,
    "text": read_text,
    "glosses": read_glosses,
}
WORD = re.compile(r"[A-Za-z][a-z'’-]*[.,;:!?)]*")
LEAST_WORDS, MOST_WORDS = 6, 400


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--modules",
        nargs="*",
        default=[],
        help=f"installed Python packages whose docstrings to take; {STANDARD_LIBRARY} = the standard library",
    )
    parser.add_argument("--list", type=Path, help="packages/lm.txt, which says its form")
    parser.add_argument("--tiers", nargs="*", default=[], help="take the lines of these tiers")
    parser.add_argument("--sources", type=Path, help="JSON file of fetch_packages.py, for a --list")
    parser.add_argument("--folder", type=Path, help="its --folder")
    parser.add_argument("--output", type=Path, required=True, help="plain, or .gz to save space")
    parser.add_argument("--sources-out", type=Path, required=True, help="JSON: what the text is from")
    args = parser.parse_args()
    extract(args)


def extract(args: argparse.Namespace) -> None:
    sources = json.loads(args.sources.read_text("utf-8")) if args.sources else []
    modules = [find_module(name) for name in args.modules]
    documents = [*docstrings(modules)]
    counts: Counter[str] = Counter({"documents": 0, "paragraphs": 0, "words": 0, "not prose": 0, "duplicate": 0})
    seen = DigestSet()
    with atomic_writers([args.output]) as (file,):
        for source, paragraphs in documents:
            kept = list(new_prose(paragraphs, seen, counts))
            if not kept:
                continue
