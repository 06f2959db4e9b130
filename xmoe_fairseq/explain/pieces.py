"""Pieces of words, as a person reads them."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from torch import Tensor

MARKS = ("<s>", "</s>")  # fairseq's, of beginning and end
JOINERS = "\u00ad\u200c\u200d"  # which words have within


def pieces_of(ids_L: Tensor, dictionary: Any) -> list[str]:
    """Without padding."""
    return [printable(dictionary[i]) for i in ids_L.tolist() if i != dictionary.pad()]


def printable(text: str) -> str:
    """Characters that steer a terminal or turn a line around as their numbers: ESC is \\x1b."""
    return "".join(c if shows(c) else c.encode("unicode_escape").decode() for c in text)


def shows(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind not in ("Cc", "Cs", "Zl", "Zp") and (kind != "Cf" or character in JOINERS)


def in_words(pieces: Sequence[str]) -> str:
    """Without `MARKS`."""
    pieces = [piece for piece in pieces if piece not in MARKS]
    if any("▁" in piece for piece in pieces):
        return "".join(pieces).replace("▁", " ").strip()
    return " ".join(pieces)
