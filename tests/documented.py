"""The examples of the documentation, to be run as they stand there."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def example(document: str, heading: str, language: str, number: int = 0) -> str:
    """The number-th fenced block of a language under a heading (up to the next of its level or above)."""
    rest = (DOCS / document).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    level, found = len(heading.split(" ")[0]), []
    for block in re.finditer(rf"^```(\w+)\n(.*?)^```$|^#{{1,{level}}} ", rest, flags=re.M | re.S):
        if block[1] is None:  # the next heading: not a comment in a block, which is found as a whole
            break
        found += [block[2]] if block[1] == language else []
    return found[number]
