"""The examples of the documentation, to be run as they stand there."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def example(document: str, heading: str, language: str, number: int = 0) -> str:
    """The number-th fenced block of a language under a heading (up to the next of its level or above)."""
    text = (DOCS / document).read_text(encoding="utf-8")
    level, rest = (
        text.partition(f"\n{heading}\n")[1].strip().split(" ")[0],
        text.partition(f"\n{heading}\n")[2],
    )
    section = re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.M)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.M | re.S)[number]
