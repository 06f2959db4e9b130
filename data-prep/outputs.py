"""Writing files that are whole or not there, and never over what is read: what every script here shares.

How a file gets its name is xmoe_fairseq_compat.files's; here are the checks, and packing.
"""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TextIO

from textio import DataError

from xmoe_fairseq_compat import files

FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def check_files(outputs: Iterable[Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """Before any work: raises DataError where an output is an input or another output, by any name.

    None, for a flag that was not given, is passed over.

    Raises:
        OSError: an input is not there.
    """
    read = {}
    for path in filter(None, inputs):
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: is a pipe or device; name a file")  # some are read twice
        read[identity(path)] = path
    written: set[object] = set()
    for path in filter(None, outputs):
        if path.name.startswith(".."):
            raise DataError(f"{path}: begins with two dots; give a prefix that ends in a name")
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is no regular file; name another output")
        if (same := read.get(identity(path))) or (same := read.get(identity(Path(files.temporary_of(path))))):
            raise DataError(f"{path}: is the input {same}, which would be overwritten; name another output")
        if identity(path) in written:
            raise DataError(f"{path.name}: named for two outputs; give each a file of its own")
        written.add(identity(path))


def identity(path: Path) -> object:
    """The same for two names of one file, also through links."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)  # of a loop of links too
    return found.st_dev, found.st_ino


@contextmanager
def atomic_files(paths: Iterable[Path]) -> Iterator[list[IO[bytes]]]:
    """As xmoe_fairseq_compat's; what is named .gz or .xz is packed, and what is read never overwritten."""
    targets = [Path(path) for path in paths]
    check_files(targets)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.atomic_files(targets) as raw, ExitStack() as stack:
            yield [
                stack.enter_context(packed(file, target.suffix))
                for file, target in zip(raw, targets, strict=True)
            ]
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            raise DataError(f"{targets[0]}: cannot be written: {error.strerror}") from None
        raise


def packed(file: IO[bytes], suffix: str) -> AbstractContextManager[IO[bytes]]:
    if suffix == ".gz":  # without name and time, so that the same text gives the same bytes
        return gzip.GzipFile("", "wb", fileobj=file, mtime=0)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(file, "wb")
    return nullcontext(file)


@contextmanager
def atomic_writers(paths: Iterable[Path]) -> Iterator[list[TextIO]]:
    """As atomic_files, for text."""
    with atomic_files(paths) as opened, ExitStack() as stack:
        yield [stack.enter_context(TextIOWrapper(file, encoding="utf-8", newline="\n")) for file in opened]


def write_bytes(path: Path, data: bytes) -> None:
    """As atomic_files, for data that is already whole."""
    with atomic_files([path]) as (file,):
        file.write(data)


def as_json(value: object) -> bytes:
    """As it is written everywhere here."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """An empty folder for what does not fit in memory; it goes when the block ends."""
    folder = Path(files.temporary_of(f"{beside}.work"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
