"""Is a checkpoint as large as it says, and are its bytes those that were written?

Asked before anything is allocated, and of facts: sizes that a file declares against its own size, and the
checksums that torch writes into it but never looks at. An honest file of any size passes.
"""

from __future__ import annotations

import errno
import os
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, Any

from xmoe_fairseq_compat.errors import CheckpointError

MOST_TIMES = 100  # as large as its compressed form: weights, zeros between them, come nowhere near; a choice
SMALL = 2**26  # bytes that any machine has: a tensor may be a view that repeats a few numbers
BLOCK = 2**22  # bytes that are read at once: a choice
DAMAGED = "it is damaged or no checkpoint; copy it again or use another"


_compare: ContextVar[bool] = ContextVar("compare", default=True)


@contextmanager
def without_sums() -> Iterator[None]:
    """In this block tensors are not compared with their checksums: for files that take minutes to read."""
    token = _compare.set(False)
    try:
        yield
    finally:
        _compare.reset(token)


def check_zip(file: Any, sums: bool = True) -> tuple[int, bool]:
    """A checkpoint's size in memory, in bytes, and whether it may be mapped.

    Args:
        file: a path, or an open file that can be sought.
        sums: read all of it to compare the checksums of the tensors; not within `without_sums`.

    Raises:
        CheckpointError: it is damaged, or expands to what only a file meant to harm does.
        OSError: it cannot be read.
    """
    with _opened(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if stream.read(4) != b"PK\3\4":  # torch < 1.6 wrote no zip files
            return size, False
        try:
            with zipfile.ZipFile(stream) as archive:
                return _check_entries(file, archive, size, sums)
        except CheckpointError:
            raise
        except Exception as error:  # of many types: what is damaged may be any number in it
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # an offset that no file has
                raise
            raise CheckpointError(file, DAMAGED) from error


@contextmanager
def _opened(file: Any) -> Iterator[IO[bytes]]:
    if not hasattr(file, "read"):
        with open(file, "rb") as stream:
            yield stream
        return
    start = file.tell()
    try:
        yield file
    finally:
        file.seek(start)


def _check_entries(file: Any, archive: zipfile.ZipFile, size: int, sums: bool) -> tuple[int, bool]:
    entries = archive.infolist()
    packed = sum(entry.compress_size for entry in entries)
    unpacked = sum(entry.file_size for entry in entries)
    if packed > size:
        raise CheckpointError(
            file, f"its parts overlap: they claim {packed:,} bytes, the file has {size:,}; do not use it"
        )
    if unpacked > MOST_TIMES * size:
        raise CheckpointError(
            file, f"its {size:,} bytes would become {unpacked:,} when it is unpacked; do not use it"
        )
    stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    if len({entry.filename for entry in entries}) < len(entries):
        raise CheckpointError(file, "it holds two parts of the same name; do not use it")
    if any(entry.file_size != entry.compress_size for entry in stored):
        raise CheckpointError(file, DAMAGED)
    if any(
        entry.CRC for entry in entries
    ):  # torch.serialization.set_crc32_options(False) makes all of them 0
        for entry in entries:
            if (sums and _compare.get()) or "/data/" not in entry.filename:
                _check_sum(file, archive, entry)
    return max(size, unpacked), len(stored) == len(entries)


def _check_sum(file: Any, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    try:
        with archive.open(entry) as part:
            while part.read(BLOCK):
                pass
    except zipfile.BadZipFile as error:
        what = f"it is damaged: {entry.filename} in it is not what was written (by its checksum)"
        raise CheckpointError(file, f"{what}; copy it again or use another") from error


def check_claims(file: Any, state: Any, size: int) -> None:
    """Raises CheckpointError where a tensor or array in a checkpoint is larger than the whole of it."""
    for name, value in tensors(state):
        claimed = value.nbytes if hasattr(value, "nbytes") else len(value)
        if claimed > max(size, SMALL):
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            raise CheckpointError(
                file, f"{name}{shape} claims {claimed:,} bytes, the file has {size:,}; do not use it"
            )
        if getattr(value, "is_meta", False):
            raise CheckpointError(file, f"{name} is a shape without values; save it again from a real model")


def tensors(state: Any) -> Iterator[tuple[str, Any]]:
    """All tensors, arrays and byte strings in nested containers, each once, with the way to it."""
    import numpy as np
    import torch

    waiting, seen = [("", state)], set()
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (torch.Tensor, np.ndarray, bytearray)):
            yield name, value
        else:
            waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in children(value)]


def children(value: Any) -> Iterable[tuple[Any, Any]]:
    """What is in a container that a checkpoint may hold; nothing, where it is none."""
    value = vars(value) if isinstance(value, Namespace) else plain(value)
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple, set, frozenset)) else ()


def plain(value: Any) -> Any:
    """What a node of omegaconf's holds; anything else is as it is."""
    inside = getattr(value, "__dict__", {})
    return inside.get("_val", inside.get("_content", value))
