"""Formats that are nearly plain text: paragraphs, Perl's POD, WordNet's glosses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from formats.blocks import read_file


def read_text(path: Path) -> Iterator[str]:
    yield from re.split(r"\n\s*\n", _text(path))


def read_pod(path: Path) -> Iterator[str]:
    """Ordinary paragraphs; not commands (=head1) nor verbatim ones (indented)."""
    for paragraph in read_text(path):
        if not paragraph.startswith((" ", "\t", "=")):
            paragraph = re.sub(r"[A-Z](<<+)\s+(.*?)\s+>>+", r"\2", paragraph)
            for _ in range(3):  # codes may be nested: B<I<text>>; a link may have a text: L<text|target>
                paragraph = re.sub(r"[A-Z]<([^<>|]*)(\|[^<>]*)?>", r"\1", paragraph)
            yield paragraph


def read_glosses(path: Path) -> Iterator[str]:
    """WordNet's data files: the definition, and examples, after the bar."""
    for line in _text(path).split("\n"):
        _, bar, gloss = line.partition(" | ")
        if bar:
            yield gloss.strip().replace('"', "")


def _text(path: Path) -> str:
    return read_file(path).decode("utf-8", "replace")
