"""Extract English prose from the docstrings of installed Python packages, and from unpacked Debian ones.

Out: a paragraph a line, an empty line between documents (files); a paragraph occurs once in all of them.
Memory: the largest document, and 14 to 27 MB for a million paragraphs.
"""

from __future__ import annotations

import argparse
import functools
import html
import importlib.metadata
import importlib.util
import itertools
import platform
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from counts import add_workers, check_workers, new_parser, report
from digests import DigestSet, digest
from formats.descriptions import description_blocks, read_index, source_packages
from formats.docstrings import read_docstrings
from formats.manpage import read_manpage
from formats.markup import read_docbook, read_html
from formats.plain import read_glosses, read_pod, read_text
from outputs import as_json, atomic_writers, check_files, write_bytes
from parallel import in_order
from textio import DataError, in_chunks, normalize, read_entries, read_lines, run

File = tuple[str, str, Any]  # source, reader, and what that reads: a path, or texts
STANDARD_LIBRARY = "python"
NOT_READ = {"site-packages", "test", "tests", "_vendor", "idlelib"}
READERS: dict[str, Callable[[Any], Iterable[str]]] = {
    "descriptions": lambda texts: (block.text for text in texts for block in description_blocks(text)),
    "html": lambda path: (block.text for block in read_html(path)),
    "docbook": lambda path: (block.text for block in read_docbook(path)),
    "man": lambda path: (block.text for block in read_manpage(path)),
    "pod": read_pod,
    "text": read_text,
    "glosses": read_glosses,
    "docstrings": read_docstrings,
}
WORD = re.compile(r"[A-Za-z][a-z'’-]*[.,;:!?)]*")
# Choices. Of a paragraph; the shares are of its characters (letters and spaces, ASCII) and of its words.
LEAST_WORDS, MOST_WORDS = 6, 400
LETTERS, ASCII, ENGLISH = 0.82, 0.97, 0.65
MOST_PARAGRAPHS = 500  # of a document; a longer file (a dictionary, say) becomes several


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
    parser.add_argument("--output", type=Path, required=True, help="the documents")
    parser.add_argument("--sources-out", type=Path, required=True, help="JSON: what the text is from")
    add_workers(parser)
    args = parser.parse_args()
    check_workers(args)
    check_files([args.output, args.sources_out, args.counts], [args.list, args.sources])
    extract(args)


def extract(args: argparse.Namespace) -> None:
    if bool(args.list) != bool(args.sources and args.folder and args.tiers):
        raise DataError("--list goes with --tiers, --sources and --folder; give all four or none")
    modules = [Module(name) for name in args.modules]
    packages = Packages(args) if args.list else None
    files = itertools.chain(*(module.files() for module in modules), packages.files() if packages else ())
    counts = Counter({"documents": 0, "paragraphs": 0, "words": 0, "not prose": 0, "duplicate": 0})
    seen = DigestSet()
    with atomic_writers([args.output]) as (output,):
        for source, prose, refused in in_order(read_prose, files, args.workers):
            counts["not prose"] += refused
            new = [text for text in prose if seen.add(digest(re.sub(r"[\W\d_]+", "", text.casefold())))]
            counts["duplicate"] += len(prose) - len(new)
            counts["paragraphs"] += len(new)
            for part in in_chunks(new, MOST_PARAGRAPHS):
                counts.update(documents=1, words=(words := sum(len(text.split()) for text in part)))
                counts[f"{source} words"] += words
                output.write("\n".join(part) + "\n\n")
        if not counts["documents"]:
            raise DataError("no English prose found; give --modules or --list")
    sources = [*(module.describe() for module in modules), *(packages.entries if packages else ())]
    write_bytes(args.sources_out, as_json(sources))
    report(counts, args.counts)


def read_prose(file: File) -> tuple[str, list[str], int]:
    """Source, the paragraphs that are prose, and how many are not."""
    source, reader, what = file
    try:
        paragraphs = [normalize(html.unescape(text)) for text in READERS[reader](what)]
    except DataError as error:  # one broken file among thousands
        print(f"{source}: {error}; left out", file=sys.stderr)
        return source, [], 0
    prose = [text for text in paragraphs if is_prose(text)]
    return source, prose, len(paragraphs) - len(prose)


def is_prose(text: str) -> bool:
    """A paragraph mostly of English words: no table, code, list of names or other language."""
    words = text.split()
    if not LEAST_WORDS <= len(words) <= MOST_WORDS:
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    if letters < LETTERS * len(text) or sum(c.isascii() for c in text) < ASCII * len(text):
        return False
    return sum(WORD.fullmatch(word) is not None for word in words) >= ENGLISH * len(words)


distributions = functools.cache(importlib.metadata.packages_distributions)  # it takes a second


class Module:
    """An installed Python package, or the standard library."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == STANDARD_LIBRARY:
            self.folder = Path(sysconfig.get_path("stdlib"))
            return
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"--modules: no Python package {name} is installed; run: bash scripts/setup.sh")
        self.folder = Path(spec.submodule_search_locations[0])
        found = distributions().get(name)
        if not found:
            raise DataError(f"--modules: nothing says which version and licence {name} has; leave it out")
        self.distribution = found[0]

    def files(self) -> Iterator[File]:
        for path in sorted(self.folder.rglob("*.py*")):
            inside = {*path.relative_to(self.folder).parts}
            if path.suffix in (".py", ".pyi") and not inside & NOT_READ:
                yield self.name, "docstrings", path

    def describe(self) -> dict[str, str]:
        entry = {"task": "lm", "name": f"{self.name} docstrings"}
        if self.name == STANDARD_LIBRARY:
            return {**entry, "version": platform.python_version(), "licence": "PSF-2.0"}
        about = importlib.metadata.metadata(self.distribution)
        classes = about.get_all("Classifier", [])
        classes = [name.split(" :: ")[-1] for name in classes if name.startswith("License :: ")]
        named = {name: about[name] for name in ("License-Expression", "License") if name in about}
        licence = named.get("License-Expression") or ", ".join(classes) or named.get("License", "not said")
        return {**entry, "version": about["Version"], "licence": licence}


class Packages:
    """Unpacked Debian packages, read as the list says."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.list, self.tiers = args.list, args.tiers
        self.entries = read_entries(args.sources, "name", "folder")
        self.folders = {entry["name"]: args.folder / entry["folder"] for entry in self.entries}
        for folder in self.folders.values():
            if not folder.is_dir():
                raise DataError(f"{folder}: folder is missing; run fetch_packages.py again")

    def files(self) -> Iterator[File]:
        for number, line in enumerate(read_lines(self.list), 1):
            cells = line.split()
            if not cells or line.startswith("#") or cells[0] not in self.tiers:
                continue
            if len(cells) != 4 or cells[2] not in READERS:
                raise DataError(
                    f"{self.list}:{number}: expected tier, package, reader ({', '.join(READERS)}), path"
                )
            for name in (name for name in cells[1].split("|") if name in self.folders):
                for path in sorted(self.folders[name].glob(cells[3])):
                    yield name, cells[2], path
        if "descriptions" in self.tiers:
            yield from self.descriptions()

    def descriptions(self) -> Iterator[File]:
        """The descriptions of all packages of a source package are one document."""
        folder = self.folders["descriptions"]
        source_of, documents = source_packages(folder), defaultdict(list)
        for path in sorted(folder.glob("*_Translation-en")):
            for description in read_index(path):
                documents[source_of.get(description.package, description.package)].append(description.text)
        for texts in documents.values():
            yield "descriptions", "descriptions", texts


if __name__ == "__main__":
    run(main)
