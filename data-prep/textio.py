"""Reading and writing text that may be larger than memory: what every script here shares.

Readers check the encoding and name file and line. Writers write beside the target and rename at the
end, so that a file under its final name is always whole. Errors a user can mend are DataError: one line.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TextIO, TypeVar, cast

Item = TypeVar("Item")

MAX_LINE_BYTES = 1 << 20  # a longer "line" is a wrong file; reading it whole could fill the memory
PARTIAL = ".partial"  # a fixed suffix, so that the next run overwrites what a killed one left

# Invisible characters without meaning for translation, and control characters: they only split
# otherwise equal words. Whitespace among them (tab, NBSP, ...) is handled by str.split.
_INVISIBLE = dict.fromkeys(
    [0xAD, 0x200B, 0x200E, 0x200F, 0xFEFF]
    + [c for c in (*range(0x20), *range(0x7F, 0xA0)) if not chr(c).isspace()]
)


class DataError(Exception):
    """Something the user can mend; its text is the one line that is shown."""


def run(main: Callable[[], None]) -> None:
    """Call main; turn an expected failure into one line and exit status 1."""
    try:
        main()
    except (DataError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {describe(error)}")


def describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def normalize(text: str) -> str:
    """NFC, no invisible characters, every run of whitespace (NBSP too) one space."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_INVISIBLE).split())


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def read_lines(path: Path, most: int = MAX_LINE_BYTES) -> Iterator[str]:
    """The lines of a plain, .gz or .xz file, without their ends. Only \\n ends a line."""
    number = 0
    with _open_bytes(path) as file:
        while True:
            try:
                line = file.readline(most + 1)
            except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{path}: cannot unpack after line {number}: {error}; get it again") from None
            if not line:
                break
            number += 1
            if len(line) > most:
                raise DataError(f"{path}:{number}: line above {most} bytes; is it a text file?")
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
        raise DataError(f"{short} has {count} lines, but {long} has more; parallel files need equal counts")


def check_distinct(outputs: Iterable[Path]) -> None:
    for path, times in Counter(output.resolve() for output in outputs).items():
        if times > 1:
            raise DataError(f"{path.name}: named for two outputs; give each a file of its own")


@contextmanager
def atomic_writers(paths: Iterable[Path]) -> Iterator[list[TextIO]]:
    """Text files that get their names only when the block ends without an exception."""
    targets = [Path(path) for path in paths]
    check_distinct(targets)
    partials = [target.with_name(target.name + PARTIAL) for target in targets]
    try:
        with ExitStack() as stack:
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            yield [stack.enter_context(p.open("w", encoding="utf-8", newline="\n")) for p in partials]
        for partial, target in zip(partials, targets, strict=True):
            partial.replace(target)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """An empty folder for what does not fit in memory; it goes when the block ends."""
    folder = beside.with_name(beside.name + ".work" + PARTIAL)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items, the last one shorter."""
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk


def write_bytes(path: Path, data: bytes) -> None:
    """As atomic_writers, for data that is already whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(data)
    partial.replace(path)
