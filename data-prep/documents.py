"""Documents from files of the kinds that text comes in; of each file only a piece is in memory.

    .txt and any other, plain or .gz, .xz   a paragraph a line, an empty line between documents
    .jsonl .json, plain or .gz, .xz         a document a line, its text in "text"
    .parquet                                a document a row, its text in the column "text" (needs pyarrow)

Line breaks inside a text end paragraphs. FORMS says what a row is where it is not a document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from textio import DataError, in_chunks, normalize, read_lines

ROWS = 1000  # parquet rows in memory: a choice
SENTENCES = 1000  # a choice; that make a document where the source has no marks between them
# WikiText's "= Title =" of an article; "= = Section = =" of its parts
TITLE = re.compile(r"^\s*= (?!=)[^\n]*[^=\s] =\s*$")


def read_documents(paths: Iterable[Path], form: str = "documents") -> Iterator[list[str]]:
    """Documents as lists of lines as they come: not normalised, and some may be empty."""
    if form == "documents":
        for path in paths:
            whole = _kind(path) == ".txt"
            yield from _paragraphs(read_lines(path)) if whole else (text.split("\n") for text in _rows(path))
    else:  # a document may go on in the next file
        rows = (row for path in paths for row in _rows(path))
        yield from _articles(rows) if form == "wikitext" else in_chunks(rows, SENTENCES)


FORMS = {
    "documents": "a document a row",
    "wikitext": "a line a row, as in WikiText; '= Title =' begins a document",
    "sentences": f"a sentence a row and no marks between documents; {SENTENCES} rows make one",
}


def _kind(path: Path) -> str:
    suffix = Path(path.stem if path.suffix in (".gz", ".xz") else path.name).suffix
    return {".json": ".jsonl", ".jsonl": ".jsonl", ".parquet": ".parquet"}.get(suffix, ".txt")


def _rows(path: Path) -> Iterator[str]:
    return {".txt": read_lines, ".jsonl": _json_rows, ".parquet": _parquet_rows}[_kind(path)](path)


def _json_rows(path: Path) -> Iterator[str]:
    for number, line in enumerate(read_lines(path, most=1 << 28), 1):
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
            text.encode()  # JSON can spell half a character
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f'{path}:{number}: not an object with a string "text"') from None
        yield text


def _parquet_rows(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: needs pyarrow; run: pip install -c constraints.txt pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise DataError(f"{path}: file has no rows; expected at least one")
            for batch in file.iter_batches(ROWS, columns=["text"]):
                yield from (text or "" for text in batch.column("text").to_pylist())
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: not a parquet file with a column 'text' ({error}); get it again") from None


def _paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    document: list[str] = []
    for line in lines:
        # only short lines are looked at closely: an invisible character or two is no text
        if line.strip() and (len(line) > 8 or normalize(line)):
            document.append(line)
        elif document:
            yield document
            document = []
    if document:
        yield document


def _articles(rows: Iterable[str]) -> Iterator[list[str]]:
    article: list[str] = []
    for row in rows:
        blank = not article or not article[-1].strip()
        if blank and TITLE.match(row) and any(line.strip() for line in article):
            yield article
            article = []
        article.append(row)
    yield article
