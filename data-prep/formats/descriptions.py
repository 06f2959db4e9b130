"""Package descriptions in English and other languages: apt's Translation-LANG indexes, uncompressed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from formats.blocks import Block

BULLET = re.compile(r"\s+[*\-+o•–]\s+(.*)")


@dataclass(frozen=True)
class Description:
    package: str
    md5: str  # of the English description: the same in every language's index
    text: str


def read_index(path: Path) -> Iterator[Description]:
    """One stanza at a time: `Package:`, `Description-md5:`, `Description-LANG:` with indented lines."""
    fields: dict[str, str] = {}
    name = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in itertools.chain(file, ["\n"]):
            line = line.rstrip("\n")
            if line.startswith(" "):
                fields[name] = fields.get(name, "") + "\n" + line
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            else:
                text = next((fields[k] for k in fields if re.fullmatch(r"Description-(?!md5)\w+", k)), "")
                if text and "Description-md5" in fields:
                    yield Description(fields.get("Package", ""), fields["Description-md5"], text)
                fields = {}


def description_blocks(text: str) -> list[Block]:
    """The short description, then the long one's paragraphs (a ` .` line apart) and list items."""
    short, *lines = text.split("\n")
    blocks = [Block("short", short)]
    begin = True
    for line in (line[1:] for line in lines):
        if line.strip() == ".":
            begin = True
        elif bullet := BULLET.match(line):
            blocks.append(Block("item", bullet[1]))
            begin = False
        elif begin:
            blocks.append(Block("paragraph", line.strip()))
            begin = False
        else:
            blocks[-1] = blocks[-1]._replace(text=f"{blocks[-1].text} {line.strip()}")
    return blocks


def source_packages(folder: Path) -> dict[str, str]:
    """From apt's Packages indexes: the source package of each package whose name differs from it."""
    found = {}
    for path in sorted(folder.glob("*_Packages")):
        package = ""
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("Package: "):
                    package = line[9:].strip()
                elif line.startswith("Source: "):
                    found[package] = line[8:].split()[0]
    return found
