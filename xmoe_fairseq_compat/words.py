"""Which words there are in scored tokens.

A word is what stands between white space, and the end of each line, which is a token too: the definition of
scripts/experiments/score.py, which counts the words in the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xmoe_fairseq_compat.errors import FlagError

if TYPE_CHECKING:
    from numpy import ndarray

MARKS = {"subword_nmt": "@@", "@@ ": "@@", "sentencepiece": "▁"}


def texts_of(dictionary: Any, post_process: str | None) -> list[str]:
    """The text that each token stands for, with the white space that it implies.

    Raises:
        FlagError: --remove-bpe (or --post-process) does not tell the words of this dictionary.
    """
    symbols = [dictionary[i] for i in range(len(dictionary))]
    if post_process in (None, "none"):
        return [f" {symbol} " for symbol in symbols]
    if post_process not in MARKS:
        rule = "must be subword_nmt or sentencepiece for a perplexity per word"
        raise FlagError(f"--remove-bpe (--post-process) {rule}, got {post_process}")
    mark = MARKS[post_process]
    if not any(mark in symbol for symbol in symbols):
        raise FlagError(
            f"--remove-bpe {post_process}: no entry of the dictionary has {mark}; give the right kind"
        )
    if mark == "▁":
        texts = [symbol.replace(mark, " ") for symbol in symbols]
    else:
        texts = [symbol[: -len(mark)] if symbol.endswith(mark) else f"{symbol} " for symbol in symbols]
    texts[dictionary.eos()] = f" {symbols[dictionary.eos()]} "
    return texts


class Text:
    """Scored tokens in the order of the text, over the borders of the blocks into which it was cut.

    Attributes:
        token_T, score_T, block_T: arrays of T tokens: id, natural logarithm of the probability, block.
        word_T: the number of the word to which a token belongs, from 1. (Of those in one token: the last.)
    """

    def __init__(self, blocks: dict[int, tuple[ndarray, ndarray]], texts: list[str]) -> None:
        import numpy as np

        order = sorted(blocks)
        nothing = np.zeros(0, np.int64)
        self.token_T = np.concatenate([nothing, *(blocks[i][0] for i in order)])
        self.score_T = np.concatenate([nothing, *(blocks[i][1] for i in order)])
        self.block_T = np.repeat(np.array(order, np.int64), [len(blocks[i][0]) for i in order])
        self.texts = texts
        words_in = np.array([len(text.split()) if text else 1 for text in texts])
        begins_inside = np.array([text[:1] != " " for text in texts])
        ends_inside = np.array([text[-1:] != " " for text in texts])
        in_order = np.diff(self.block_T, prepend=-2) <= 1  # a block may have been left out
        before = np.concatenate([[False], ends_inside[self.token_T[:-1]]])[: len(self.token_T)]
        new_T = words_in[self.token_T] - (begins_inside[self.token_T] & before & in_order)
        self.words = int(new_T.sum())
        self.word_T = new_T.cumsum() + (words_in[self.token_T] == 0)

    def each_word(self) -> list[tuple[int, str, float, bool]]:
        """Block in which it ends, text, natural logarithm of the probability, whether of several tokens."""
        found: list[tuple[int, str, float, bool]] = []
        last = 0
        for word, block, token, score in zip(
            self.word_T, self.block_T, self.token_T, self.score_T, strict=True
        ):
            text, total = self.texts[token], float(score)
            if word == last:
                _, start, before, _ = found.pop()
                text, total = start + text, before + total
            found.append((int(block), text, total, bool(word == last)))
            last = word
        return [(block, text.strip(), score, several) for block, text, score, several in found]
