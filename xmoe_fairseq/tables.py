"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Ends with a line's end."""
    head, *body = (f"| {' | '.join(map(str, cells))} |\n" for cells in (titles, *rows))
    return "".join([head, "|---" * len(titles) + "|\n", *body])
