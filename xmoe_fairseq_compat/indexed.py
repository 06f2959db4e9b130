"""Binarised data: an index (.idx) and its data (.bin) belong together, and are whole."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import patch, wrap

if TYPE_CHECKING:
    from numpy import dtype, ndarray

CHUNK = 1 << 20  # numbers that are looked at at once: a choice
MAGIC = {b"MMIDIDX\x00\x00": "mmap", b"TNTIDX\x00\x00": "cached", b"HUFFIDX\x00\x00": "huffman"}


class Pair:
    """An index with its data, by what is before .idx and .bin."""

    def __init__(self, prefix: str, types: dict[int, Any]) -> None:
        self.index, self.data, self.types = f"{prefix}.idx", f"{prefix}.bin", types

    def both(self) -> bool:
        """Whether there are such files. Raises UserError where there is one without the other."""
        found = {name: os.path.exists(name) for name in (self.index, self.data)}
        if len(set(found.values())) == 2:
            there, missing = sorted(found, key=lambda name: not found[name])
            raise UserError(f"{missing} is missing, which belongs to {there}; copy both, or binarise again")
        return found[self.index]

    def damaged(self, problem: str) -> NoReturn:
        raise UserError(f"{self.index} is damaged: {problem}; copy it again, or binarise again")

    def kind(self) -> str:
        """mmap, cached (also read as lazy) or huffman."""
        with open(self.index, "rb") as file:
            start = file.read(9)
        for magic, kind in MAGIC.items():
            if start.startswith(magic):
                return kind
        self.damaged("it does not begin as an index does" if start else "it is empty")

    def fields(self, layout: str, at: int) -> tuple[int, ...]:
        """Whole numbers of the header."""
        with open(self.index, "rb") as file:
            file.seek(at)
            read = file.read(struct.calcsize(layout))
        if len(read) < struct.calcsize(layout):
            self.damaged("it ends within its header")
        return struct.unpack(layout, read)

    def sized(self, header: int, entries: int, item_bytes: int, extra: int = 0) -> None:
        """Compare the index's size with what its header promises."""
        promised, size = header + entries * item_bytes + extra, os.path.getsize(self.index)
        if promised != size:
            self.damaged(f"for its {entries:,} entries it would have {promised:,} bytes, and it has {size:,}")

    def matches(self, tokens: int, item: dtype[Any]) -> None:
        """Compare the data's size with what the index describes."""
        promised, size = tokens * item.itemsize, os.path.getsize(self.data)
        if promised != size:
            raise UserError(
                f"{self.index} is not the index of {self.data}: it describes {promised:,} bytes, and the file"
                f" has {size:,}; one of them is cut short or of other data: copy both, or binarise again"
            )

    def item_type(self, code: int) -> dtype[Any]:
        import numpy as np

        if code not in self.types:
            self.damaged(f"it has no type of number {code}")
        item: dtype[Any] = np.dtype(self.types[code])
        return item


def numbers(file: str, kind: Any, at: int, count: int) -> Iterator[ndarray]:
    """`count` numbers that begin at a byte of a file, in chunks."""
    import numpy as np

    with open(file, "rb") as opened:
        opened.seek(at)
        for start in range(0, count, CHUNK):
            yield np.fromfile(opened, kind, min(CHUNK, count - start))


def check_mmap(pair: Pair) -> tuple[int, dtype[Any]]:
    """Tokens in the data, and their type."""
    import numpy as np

    version, code, entries = pair.fields("<QBQ", 9)
    item = pair.item_type(code)
    if version != 1:
        pair.damaged(f"version {version}")
    pair.sized(26, entries, 4 + 8)  # the header's bytes; a size and a place for each sentence
    sizes, places = (
        numbers(pair.index, np.int32, 26, entries),
        numbers(pair.index, np.int64, 26 + 4 * entries, entries),
    )
    tokens = 0
    for size, place in zip(sizes, places, strict=True):
        ends = tokens + size.cumsum(dtype=np.int64)
        if (size < 0).any() or (place != (ends - size) * item.itemsize).any():
            pair.damaged("its sentences do not follow one another")
        tokens = int(ends[-1])
    return tokens, item


def check_cached(pair: Pair) -> tuple[int, dtype[Any]]:
    """Tokens in the data, and their type."""
    import numpy as np

    version, code, width, entries, dimensions = pair.fields("<QQQQQ", 8)
    item = pair.item_type(code)
    if version != 1 or width != item.itemsize:
        pair.damaged(f"version {version}, numbers of {width} bytes")
    pair.sized(48, entries, 2 * 8, 8 * 2 + 8 * dimensions)  # likewise, in 8 bytes each
    sizes = numbers(pair.index, np.int64, 48 + 16 * (entries + 1), dimensions)
    places = numbers(pair.index, np.int64, 48 + 8 * (entries + 1) + 8, entries)
    tokens = 0
    if dimensions != entries:
        pair.damaged("its sentences are no sequences")
    for size, place in zip(sizes, places, strict=True):
        ends = tokens + size.cumsum()
        if (size < 0).any() or (place != ends).any():
            pair.damaged("its sentences do not follow one another")
        tokens = int(ends[-1])
    return tokens, item


def check_tokens(pair: Pair, tokens: int, item: dtype[Any], first: int, entries: int) -> None:
    """Raises UserError where the data holds what is no entry of its dictionary.

    Args:
        first: the number that stands for the dictionary's first entry.
    """
    for chunk in numbers(pair.data, item, 0, tokens):
        for found in (int(chunk.min()) - first, int(chunk.max()) - first):
            if not 0 <= found < entries:
                raise UserError(
                    f"{pair.data} holds token {found}, and its dictionary has {entries} entries: it is"
                    " damaged, or was binarised with another dictionary"
                )


CHECKS: dict[str, Callable[[Pair], tuple[int, dtype[Any]]]] = {"mmap": check_mmap, "cached": check_cached}


@patch("fairseq.data.indexed_dataset")
def check_indexed_data(module: Any) -> None:
    """Every torch: the index of other data is accepted, and sentences are left out or cut anew; damaged files
    end in a traceback without a name, or go unnoticed; a missing file is no data, or no references."""

    @wrap(module, "make_dataset")
    def make_dataset(
        plain: Any, path: str, impl: str, fix_lua_indexing: bool = False, dictionary: Any = None
    ) -> Any:
        pair = Pair(path, module._code_to_dtype)
        impl = str(impl)  # of the command line, a member of an enumeration
        if impl in ("mmap", "cached", "lazy", "huffman") and pair.both():
            kind = pair.kind()
            if impl.replace("lazy", "cached") != kind:
                raise UserError(f"--dataset-impl {impl}: {pair.index} is of {kind} data; leave the flag out")
            if kind in CHECKS:
                tokens, item = CHECKS[kind](pair)
                pair.matches(tokens, item)
                if dictionary is not None:
                    first = int(fix_lua_indexing and kind == "cached")
                    check_tokens(pair, tokens, item, first, len(dictionary))
        return plain(path, impl, fix_lua_indexing, dictionary)

    @wrap(module, "dataset_exists")
    def dataset_exists(plain: Any, path: str, impl: str) -> bool:
        if impl not in ("raw", "fasta"):
            Pair(path, {}).both()
        return bool(plain(path, impl))


@patch("fairseq.data.indexed_dataset")
def read_what_was_not_prefetched(module: Any) -> None:
    """Every torch: data of the older kind, unless with --dataset-impl lazy, ends in a KeyError: what is left
    to be cached beforehand is not."""
    cached = module.IndexedCachedDataset

    @wrap(cached, "__getitem__")
    def __getitem__(plain: Any, self: Any, i: Any) -> Any:
        return plain(self, i) if i in self.cache_index else super(cached, self).__getitem__(i)
