"""Perplexity of an interpolated Kneser-Ney bigram model: the baseline that a language model must beat.

    python scripts/run.py experiments.bigram --train train --test test --dict dict.txt --out bigram.json

Trained and tested on the same pieces as the language model, with `</s>` at the end of every line, so the
number stands beside what fairseq-eval-lm prints. Chen and Goodman 1999, section 2.7 (one discount).
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

from experiments.results import check_output, lines, write_json
from xmoe_fairseq_compat.errors import UserError

END = "</s>"


def pieces(path: Path) -> Iterator[str]:
    for line in lines(path):
        yield from line.split()
        yield END


class Bigram:
    def __init__(self, stream: Iterable[str], vocab_size: int) -> None:
        self.vocab_size, self.pairs = vocab_size, Counter(pairwise(chain([END], stream)))
        self.followers = Counter(first for first, _ in self.pairs)
        self.predecessors = Counter(second for _, second in self.pairs)
        self.context_count: Counter[str] = Counter()
        for (first, _), count in self.pairs.items():
            self.context_count[first] += count
        once, twice = (sum(count == n for count in self.pairs.values()) for n in (1, 2))
        self.discount = once / (once + 2 * twice) if once else 0.5

    def unigram(self, piece: str) -> float:
        """Share of distinct contexts, smoothed with the uniform distribution over the dictionary."""
        held_back = self.discount * len(self.predecessors) / self.vocab_size
        return (max(self.predecessors[piece] - self.discount, 0) + held_back) / len(self.pairs)

    def probability(self, piece: str, previous: str) -> float:
        seen = self.context_count[previous]
        if not seen:
            return self.unigram(piece)
        own = max(self.pairs[previous, piece] - self.discount, 0)
        return (own + self.discount * self.followers[previous] * self.unigram(piece)) / seen

    def perplexity(self, stream: Iterable[str]) -> tuple[float, int]:
        logs = [math.log(self.probability(piece, last)) for last, piece in pairwise(chain([END], stream))]
        return math.exp(-sum(logs) / len(logs)), len(logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="pieces, one line a paragraph")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--dict", type=Path, required=True, help="fairseq dictionary, for its size")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    special = 4  # fairseq adds <s>, <pad>, </s>, <unk>
    check_output(args.out, args.train, args.test, args.dict)
    for path in (args.train, args.test):
        if not path.stat().st_size:
            raise UserError(f"{path}: file is empty; expected at least one line")
    vocab_size = special + len(lines(args.dict))
    perplexity, tokens = Bigram(pieces(args.train), vocab_size).perplexity(pieces(args.test))
    write_json(args.out, {"perplexity": perplexity, "tokens": tokens})


if __name__ == "__main__":
    main()
