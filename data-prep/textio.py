"""Reading text that may be larger than memory, and how a script ends: what every script here shares.

Readers check the encoding and name file and line. Errors a user can fix are DataError: one line.
"""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

Item = TypeVar("Item")

MAX_LINE_BYTES = 1 << 20  # a choice; a longer "line" is a wrong file; reading it whole could fill the memory

# Invisible characters without meaning for translation, and control characters: they only split
# otherwise equal words. Whitespace among them (tab, NBSP, ...) is handled by str.split.
_INVISIBLE = dict.fromkeys(
    [0xAD, 0x200B, 0x200E, 0x200F, 0xFEFF]
    + [c for c in (*range(0x20), *range(0x7F, 0xA0)) if not chr(c).isspace()]
)


class DataError(Exception):
    """Something the user can fix; its text is the one line that is shown."""


def run(main: Callable[[], None]) -> None:
    """Call main; turn an expected failure into one line and exit status 1, Ctrl-C into one and 130."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"{name}: error: {describe(error)}")
    except UnicodeEncodeError as error:
        sys.exit(
            f"{name}: error: {ascii(error.object[:99])}: holds what is no Unicode text; fix the flag or file"
        )
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)


def describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(map(str, filter(None, (error.filename2 or error.filename, error.strerror))))
    return " ".join(str(error).split())


def normalize(text: str) -> str:
    """NFC, no invisible characters, every run of whitespace (NBSP too) one space."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_INVISIBLE).split())


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


UNREADABLE = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


def read_lines(path: Path, most: int = MAX_LINE_BYTES) -> Iterator[str]:
    """The lines of a plain, .gz or .xz file, without their ends. Only \\n ends a line."""
    number = 0
    with _open_bytes(path) as file:
        while True:
            try:
                line = file.readline(most + 1)
            except UNREADABLE as error:
                raise DataError(f"{path}: cannot unpack after line {number}: {error}; get it again") from None
            if not line:
                break
            number += 1
            if len(line) > most:
                raise DataError(f"{path}:{number}: line above {most} bytes; is it a text file?")
            if number == 1:
                if 4 * line.count(0) > len(line):  # a stray one is no letter, and the cleaning drops it
                    raise DataError(
                        f"{path}:1: holds NUL bytes; is it UTF-16 or no text? convert it with iconv"
                    )
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); convert it with iconv"
                ) from None
            yield text.rstrip("\r\n")
    if number == 0:
        raise DataError(f"{path}: file is empty; expected at least one line")


def read_parallel(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Lines of two files side by side; they must have the same number of lines."""
    sides = read_lines(source), read_lines(target)
    count = 0
    while True:
        a, b = (next(side, None) for side in sides)
        if a is None or b is None:
            break
        count += 1
        yield a, b
    if a is not None or b is not None:
        short, long = (source, target) if a is None else (target, source)
        more = count + 1 + sum(1 for side in sides for _ in side)
        raise DataError(f"{short} has {count} lines, but {long} has {more}; parallel files need equal counts")


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items, the last one shorter."""
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk


def read_json(path: Path) -> Any:
    """Of a plain, .gz or .xz file."""
    with _open_bytes(path) as file:
        try:
            return json.loads(file.read())
        except (*UNREADABLE, ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); make it again") from None


def read_entries(path: Path, *names: str) -> list[dict[str, Any]]:
    """A JSON file with a list of objects, each of which has these names, with strings."""
    entries = read_json(path)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in names)
        for entry in entries
    ):
        raise DataError(f"{path}: not a list of objects with {', '.join(names)} in each; make it again")
    return entries
