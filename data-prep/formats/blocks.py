"""A document as a list of blocks, and two documents side by side."""

from __future__ import annotations

import difflib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from textio import UNREADABLE, DataError

# Choices:
LEAST_ALIKE = 0.9  # of two documents' tags, or they are not taken for translations of each other
LEAST_RUN = 8  # blocks whose tags agree in a row


class Block(NamedTuple):
    tag: str  # what kind of block: the structure by which two languages are aligned
    text: str


def read_file(path: Path) -> bytes:
    """Plain or .gz; a link is not followed, as what it points to is read under its own name.

    Raises:
        DataError: it is damaged.
    """
    if path.is_symlink() or not path.is_file():
        return b""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot unpack ({error})") from None


def align(source: list[Block], target: list[Block]) -> Iterator[tuple[str, str]]:
    """Texts at the same place of two documents that have the same structure, or long runs of the same."""
    tags = [block.tag for block in source], [block.tag for block in target]
    if tags[0] == tags[1]:
        yield from zip((b.text for b in source), (b.text for b in target), strict=True)
        return
    matcher = difflib.SequenceMatcher(None, *tags, autojunk=False)
    if matcher.quick_ratio() < LEAST_ALIKE or matcher.ratio() < LEAST_ALIKE:
        return
    for run in matcher.get_matching_blocks():
        pairs = [(source[run.a + i].text, target[run.b + i].text) for i in range(run.size)]
        if run.size >= LEAST_RUN and sum(map(_alike_in_length, pairs)) >= LEAST_ALIKE * run.size:
            yield from pairs


def _alike_in_length(pair: tuple[str, str]) -> bool:
    source, target = map(len, pair)
    # a choice, with 5 for short ones
    return bool(source and target) and 0.5 < (target + 5) / (source + 5) < 2
