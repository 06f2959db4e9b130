"""Writing files that are whole or not there, and never over what is read: what every script here shares.

Files are written beside their targets and renamed at the end. A name that ends in .gz or .xz is packed.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TextIO, cast

from textio import DataError

PARTIAL = ".partial"  # a fixed suffix, so that the next run overwrites what a killed one left
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def partial_of(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


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
        if (same := read.get(identity(path))) or (same := read.get(identity(partial_of(path)))):
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
    """Files that get their names only when the block ends without an exception, the first of them last.

    Those of an earlier run go before: a kill in between leaves the set incomplete, never of two runs.
    """
    targets = [Path(path) for path in paths]
    check_files(targets)
    partials = [partial_of(target) for target in targets]
    try:
        with ExitStack() as stack:
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            yield [
                stack.enter_context(create(partial, target.suffix))
                for partial, target in zip(partials, targets, strict=True)
            ]
        for target in targets[:-1]:
            target.unlink(missing_ok=True)
        for partial, target in reversed([*zip(partials, targets, strict=True)]):
            partial.replace(target)
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            raise DataError(f"{targets[0]}: cannot be written: {error.strerror}") from None
        raise
    finally:
        for partial in partials:
            with suppress(OSError):  # what stopped us says more
                partial.unlink()


@contextmanager
def create(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    with path.open("wb") as raw:
        if suffix == ".gz":  # without name and time, so that the same text gives the same bytes
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                yield cast(IO[bytes], packed)
        elif suffix == ".xz":
            with lzma.open(raw, "wb") as packed_xz:
                yield cast(IO[bytes], packed_xz)
        else:
            yield raw


@contextmanager
def atomic_writers(paths: Iterable[Path]) -> Iterator[list[TextIO]]:
    """As atomic_files, for text."""
    with atomic_files(paths) as files, ExitStack() as stack:
        yield [stack.enter_context(TextIOWrapper(file, encoding="utf-8", newline="\n")) for file in files]


def write_bytes(path: Path, data: bytes) -> None:
    """As atomic_files, for data that is already whole."""
    with atomic_files([path]) as (file,):
        file.write(data)


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
