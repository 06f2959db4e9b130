"""Is a text nearly one of a given set? Exact search, without comparing with each of them.

Texts are sets of word pairs, without case, punctuation, numbers and placeholders; two are near if the
Jaccard similarity of their sets reaches a threshold t. Two such sets share at least one of the first
n - ceil(t n) + 1 elements of each, in any one order of all elements; rarest first, few texts share one
(the prefix filter of Chaudhuri et al. 2006 and Bayardo et al. 2007).
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from pair_rules import PLACEHOLDER
from textio import DataError

WordPair = tuple[str, str]


def add_similarity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--similarity",
        type=float,
        default=0.6,
        help="drop what is as near to a held-out one as this; 1 = the same words (default: %(default)s)",
    )


def check_similarity(args: argparse.Namespace) -> None:
    if not 0 < args.similarity <= 1:
        raise DataError(f"--similarity must be above 0 and at most 1, got {args.similarity}")


def words(text: str) -> list[str]:
    text = re.sub(r"\d+(?:[.,]\d+)*", "0", PLACEHOLDER.sub(" ph ", text.casefold()))
    return re.findall(r"[^\W\d_]+|\d", text)


def word_pairs(text: str) -> frozenset[WordPair]:
    found = words(text)
    return frozenset(zip(["<", *found], [*found, ">"], strict=True))


class NearDuplicates:
    """Of rows: near if the first side is; the others (a translation) only if their words are the same."""

    def __init__(self, rows: Iterable[Sequence[str]], threshold: float) -> None:
        self.threshold = threshold
        self._others: set[str] = set()
        self._texts: list[frozenset[WordPair]] = []
        for first, *others in rows:
            self._texts.append(word_pairs(first))
            self._others.update(" ".join(words(other)) for other in others)
        self._others.discard("")
        self._frequency = Counter(pair for text in self._texts for pair in text)
        self._with: defaultdict[WordPair, list[frozenset[WordPair]]] = defaultdict(list)
        for text in self._texts:
            for pair in self._prefix(text):
                self._with[pair].append(text)

    def __contains__(self, row: Sequence[str]) -> bool:
        first, *others = row
        if any(" ".join(words(other)) in self._others for other in others):
            return True
        text = word_pairs(first)
        candidates = (held for pair in self._prefix(text) for held in self._with.get(pair, ()))
        return any(self._near(text, held) for held in candidates)

    def _prefix(self, text: frozenset[WordPair]) -> list[WordPair]:
        rarest_first = sorted(text, key=lambda pair: (self._frequency[pair], pair))
        return rarest_first[: len(text) - math.ceil(self.threshold * len(text)) + 1]

    def _near(self, a: frozenset[WordPair], b: frozenset[WordPair]) -> bool:
        if min(len(a), len(b)) < self.threshold * max(len(a), len(b)):
            return False
        both = len(a & b)
        return both >= self.threshold * (len(a) + len(b) - both)
