"""Plain English from the tokenised text of WikiText-103 (raw), as far as it can be told."""

from __future__ import annotations

import re

_RULES = [
    (re.compile(r" @([-,.])@ "), r"\1"),  # marks inside a word or number: "1 @,@ 500", "well @-@ known"
    (re.compile(r" ([,;:.!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{£$]) "), r"\1"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
    (re.compile(r" (n't|'(?:s|t|re|ve|ll|d|m))\b"), r"\1"),
    (re.compile(r"(\d) – (\d)"), r"\1–\2"),
]


def wikitext(line: str) -> str:
    for pattern, plain in _RULES:
        line = pattern.sub(plain, line)
    return line
