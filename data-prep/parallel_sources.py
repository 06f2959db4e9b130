"""Where parallel text lies in unpacked packages, and which reader it takes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from formats.blocks import Block, align
from formats.catalogue import catalogue_pairs
from formats.descriptions import description_blocks, read_index, source_packages
from formats.manpage import read_manpage
from formats.markup import read_docbook, read_html, read_numbered_html
from languages import Language

Reader = Callable[[Path], list[Block]]
Pair = tuple[str, str]


class Part(NamedTuple):
    """A document in two languages, not read yet: read(*arguments) gives its pairs."""

    source: str  # of the corpus' parts, the one it belongs to
    group: str  # of documents, never cut between training and test
    kind: str  # prose, or ui (messages and labels)
    read: Callable[..., Iterable[Pair]]
    arguments: tuple[object, ...]


class Tree:
    """The packages' folders, and the one with the indexes."""

    def __init__(self, packages: dict[str, Path], indexes: Path, sources: dict[str, str]) -> None:
        self.packages = packages  # by package name, in the list's order
        self.indexes = indexes
        self.sources = sources  # package name: the source package it is built from

    def files(self, pattern: str) -> Iterator[tuple[str, Path]]:
        for name, folder in self.packages.items():
            for path in sorted(folder.glob(pattern)):
                if not path.is_symlink():
                    yield name, path


def find_all(tree: Tree, language: Language) -> Iterator[Part]:
    """Prose first: of pairs that occur twice the first is kept."""
    finders = (libreoffice_help, help_pages, manuals, manual_pages, catalogues, descriptions)
    return itertools.chain.from_iterable(find(tree, language) for find in finders)


def libreoffice_help(tree: Tree, language: Language) -> Iterator[Part]:
    folder = {"zh": "zh-CN"}.get(language.code, language.code)
    base = "usr/share/libreoffice/help/{}/text"
    there = tree.packages.get(f"libreoffice-help-{language.in_packages}")
    for name, path in tree.files(base.format("en-US") + "/**/*.html"):
        within = path.relative_to(tree.packages[name] / base.format("en-US"))
        if there and (other := there / base.format(folder) / within).is_file():
            group = f"libreoffice-help/{within}"
            yield Part("libreoffice-help", group, "prose", numbered_pairs, (path, other))


def numbered_pairs(path: Path, other: Path) -> Iterator[Pair]:
    texts = read_numbered_html(path), read_numbered_html(other)
    return ((text, texts[1][key]) for key, text in texts[0].items() if key in texts[1])


def help_pages(tree: Tree, language: Language) -> Iterator[Part]:
    """GNOME's (C is English), KDE's: a folder for each language, in the same package."""
    for pattern in ("usr/share/help/C", "usr/share/doc/HTML/en"):
        for name, path in tree.files(f"{pattern}/**/*"):
            if path.suffix not in (".page", ".docbook", ".xml"):
                continue
            root = tree.packages[name] / pattern
            within = path.relative_to(root)
            for folder in language.folders:
                other = root.with_name(folder) / within
                if other.is_file():
                    yield _aligned(read_docbook, path, other, "help", f"{name}/{within}")


# English path below a package, and what in it becomes what below any package; {} is a name of the language.
MANUALS = {
    "usr/share/debian-reference/*.en.html": (r"\.en\.html", ".{}.html"),
    "usr/share/developers-reference/*.html": (r"developers-reference/", "developers-reference/{}/"),
    "usr/share/doc/debian/FAQ/*.en.html": (r"FAQ/(.*)\.en\.html", r"FAQ/{}/\1.{}.html"),
    "usr/share/doc/maint-guide/html/*.en.html": (r"/html/(.*)\.en\.html", r"-{}/html/\1.{}.html"),
    "usr/share/doc/debmake-doc/html/*.en.html": (r"\.en\.html", ".{}.html"),
    "usr/share/doc/debian-edu-doc-en/**/*.html": (r"debian-edu-doc-en", "debian-edu-doc-{}"),
    "usr/share/doc/debian-handbook/html/en-US/*.html": (r"/en-US/", "/{}/"),
    "usr/share/doc/installation-guide-amd64/en/*.html": (r"/en/", "/{}/"),
}


def manuals(tree: Tree, language: Language) -> Iterator[Part]:
    names = dict.fromkeys((*language.folders, language.in_packages))
    for pattern, (english, other) in MANUALS.items():
        for name, path in tree.files(pattern):
            within = str(path.relative_to(tree.packages[name]))
            places = [re.sub(english, other.replace("{}", lang), within) for lang in names]
            found = (root / place for place in places for root in tree.packages.values())
            if translation := next((p for p in found if p != path and p.is_file()), None):
                yield _aligned(read_html, path, translation, name, f"{name}/{path.name}")


def manual_pages(tree: Tree, language: Language) -> Iterator[Part]:
    english = {f"{p.parent.name}/{p.name}": p for _, p in tree.files("usr/share/man/man*/*.gz")}
    for folder in language.folders:
        for _, path in tree.files(f"usr/share/man/{folder}/man*/*.gz"):
            page = f"{path.parent.name}/{path.name}"
            if page in english:
                yield _aligned(read_manpage, english[page], path, "manpages", page)


def _aligned(read: Reader, path: Path, other: Path, source: str, group: str) -> Part:
    return Part(source, group, "prose", aligned_pairs, (read, path, other))


def aligned_pairs(read: Reader, path: Path, other: Path) -> Iterator[Pair]:
    return align(read(path), read(other))


STORIES = ("wesnoth",)  # source packages, whatever follows the name: wesnoth-1.18
DJANGO = ("django", "djangojs")


def catalogues(tree: Tree, language: Language) -> Iterator[Part]:
    """Message catalogues; a game's is a story, so prose."""
    for folder in language.folders:
        for name, path in tree.files(f"usr/**/{folder}/LC_MESSAGES/*.mo"):
            source = tree.sources[name]
            app = re.search(r"/([^/]+)/locale/", str(path))  # Django: many catalogues of one name
            names = [source, app[1]] if app and path.stem in DJANGO else [source]
            kind = "prose" if source.partition("-")[0] in STORIES else "ui"
            yield Part(source, ":".join([*names, path.stem]), kind, catalogue_pairs, (path,))


def descriptions(tree: Tree, language: Language) -> Iterator[Part]:
    """Package descriptions, grouped by the source package that the packages are built from."""
    suffix = {"zh": "zh%5fCN"}.get(language.code, language.code)
    translated = {d.md5: d.text for path in _indexes(tree, suffix) for d in read_index(path)}
    source_of = source_packages(tree.indexes)
    for path in _indexes(tree, "en"):
        for description in read_index(path):
            text = translated.pop(description.md5, None)
            if text is None:
                continue
            group = "description/" + source_of.get(description.package, description.package)
            yield Part("descriptions", group, "prose", description_pairs, (description.text, text))


def description_pairs(english: str, other: str) -> Iterator[Pair]:
    sides = description_blocks(english), description_blocks(other)
    if [block.tag for block in sides[0]] == [block.tag for block in sides[1]]:
        yield from ((a.text, b.text) for a, b in zip(*sides, strict=True))


def _indexes(tree: Tree, suffix: str) -> list[Path]:
    return sorted(tree.indexes.glob(f"*_Translation-{suffix}"))
