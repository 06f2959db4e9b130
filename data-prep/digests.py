"""Remembering which texts were seen, in little memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np


def digest(text: str) -> int:
    """64 bits, the same in every process (Python's own hash is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class DigestSet:
    """A set of 64-bit digests in one flat array: 14 to 27 bytes each, a quarter of a Python set.

    For held-out text. Two different lines collide with probability n * n / 2**65: 3e-4 for 100 million.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def __contains__(self, value: int) -> bool:
        return self._slots[self._find(value or 1)] != 0

    def add(self, value: int) -> bool:
        """True if the value is new. (0 marks a free slot, so 0 is stored as 1.)"""
        value = value or 1
        slot = self._find(value)
        if self._slots[slot]:
            return False
        self._slots[slot] = value
        self._used += 1
        if self._used * 5 > len(self._slots) * 3:
            self._grow()
        return True

    def _find(self, value: int) -> int:
        mask = len(self._slots) - 1
        slot = value & mask
        while self._slots[slot] not in (0, value):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(8 * 2 * len(old)))
        for value in old:
            if value:
                self._slots[self._find(value)] = value


class DigestLog:
    """Finds the repeats in a stream of any length, afterwards: digests wait on disk, by their first bits.

    Memory: one file in FILES of the digests at a time, 16 bytes each, and a bit for each record.
    """

    FILES = 64  # 2^6, for the first 6 bits: a choice

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._files = [(folder / str(number)).open("w+b") for number in range(self.FILES)]
        self._count = 0

    def add(self, values: Sequence[int]) -> None:
        """The digests of the next records."""
        value = np.array(values, dtype=np.uint64)
        place = np.arange(self._count, self._count + len(value), dtype=np.uint64)
        file = (value >> np.uint64(58)).astype(np.intp)
        order = np.argsort(file, kind="stable")
        edges = np.searchsorted(file[order], np.arange(self.FILES + 1))
        pairs = np.stack([value, place], axis=1)[order]
        for number in np.flatnonzero(np.diff(edges)):
            self._files[number].write(pairs[edges[number] : edges[number + 1]].tobytes())
        self._count += len(value)

    def repeated(self) -> np.ndarray:
        """A bit for each record, 1 if an earlier one has its digest; 8 in a byte, its lowest bit first."""
        bits = np.zeros(self._count // 8 + 1, dtype=np.uint8)
        for file in self._files:
            file.seek(0)
            value, place = np.frombuffer(file.read(), dtype=np.uint64).reshape(-1, 2).T
            file.close()
            order = np.argsort(value, kind="stable")
            again = place[order[1:][value[order[1:]] == value[order[:-1]]]].astype(np.int64)
            np.bitwise_or.at(bits, again >> 3, np.left_shift(1, again & 7).astype(np.uint8))
        return bits


def copy_first(source: Path, target: IO[str], bits: np.ndarray, end: str | None = None) -> Iterator[str]:
    """Copy the records of a file that are no repeats, and yield their lines.

    A record is a line, or everything up to a line `end`.
    """
    number = 0
    with source.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            if not bits[number >> 3] >> (number & 7) & 1:
                target.write(line)
                yield line
            number += end is None or line == end
