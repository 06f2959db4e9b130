"""Binarised data whose index and data do not belong together, or are not whole, is refused by name."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import load_indexed_dataset
from fairseq.data.indexed_dataset import MMapIndexedDataset, dataset_exists, make_builder, make_dataset
from fairseq.dataclass.constants import DATASET_IMPL_CHOICES

from xmoe_fairseq_compat.errors import UserError

SENTENCES = [[4, 5, 6, 2], [7, 2], [8, 9, 4, 2]]
IMPLS = ["mmap", "cached", "lazy"]


def write(prefix: Path, impl: str, sentences: list[list[int]] = SENTENCES) -> None:
    builder = make_builder(f"{prefix}.bin", impl, vocab_size=100)
    for sentence in sentences:
        builder.add_item(torch.IntTensor(sentence))
    builder.finalize(f"{prefix}.idx")


def read(prefix: Path, impl: str | None = None, entries: int = 6) -> list[list[int]]:
    symbols = Dictionary()
    for number in range(entries):
        symbols.add_symbol(str(number))
    data = load_indexed_dataset(str(prefix), symbols, impl)
    if data.supports_prefetch:
        data.prefetch(range(len(data)))
    return [data[i].tolist() for i in range(len(data))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sentences", [SENTENCES, [[2]], [[], [2], []]])
def test_whole_data_is_read(impl: str, sentences: list[list[int]], tmp_path: Path) -> None:
    write(tmp_path / "train", impl, sentences)
    assert read(tmp_path / "train", impl) == sentences
    if impl != "lazy":  # what the file says
        assert read(tmp_path / "train") == sentences


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_set_can_be_mapped(impl: str, tmp_path: Path) -> None:
    """As one of several that are joined."""
    write(tmp_path / "train", impl, [])
    assert len(make_dataset(str(tmp_path / "train"), impl)) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_the_index_of_other_data_is_refused(impl: str, tmp_path: Path) -> None:
    write(tmp_path / "train", impl)
    write(tmp_path / "valid", impl, SENTENCES[:2])
    (tmp_path / "train.idx").write_bytes((tmp_path / "valid.idx").read_bytes())
    files = f"{tmp_path / 'train.idx'} is not the index of {tmp_path / 'train.bin'}"
    with pytest.raises(UserError, match=files):
        read(tmp_path / "train", impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("missing", ["idx", "bin"])
def test_half_a_data_set_is_refused(impl: str, missing: str, tmp_path: Path) -> None:
    """Of the target side too, which would otherwise be no references at all."""
    write(tmp_path / "train", impl)
    (tmp_path / f"train.{missing}").unlink()
    with pytest.raises(UserError, match=rf"train\.{missing} is missing, which belongs to \S+/train\."):
        read(tmp_path / "train", impl)
    with pytest.raises(UserError, match="is missing"):
        dataset_exists(str(tmp_path / "train"), impl)


def edited(at: int, layout: str, *values: int) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        packed = struct.pack(layout, *values)
        return content[:at] + packed + content[at + len(packed) :]

    return edit


CUT: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("idx", lambda content: b""),
    ("idx", lambda content: content[:12]),
    ("idx", lambda content: content[:-3]),
    ("idx", lambda content: content + b"\0"),
    ("idx", lambda content: b"x" + content[1:]),
    ("bin", lambda content: b""),
    ("bin", lambda content: content[:-1]),
    ("bin", lambda content: content + b"\0\0"),
]
MMAP = [
    ("idx", edited(9, "<Q", 2)),  # version
    ("idx", edited(17, "<B", 99)),  # type
    ("idx", edited(17, "<B", 5)),  # a wider one
    ("idx", edited(18, "<Q", 2)),  # sentences
    ("idx", edited(18, "<Q", 1 << 60)),
    ("idx", edited(26, "<i", -4)),  # the first one's size
    ("idx", edited(26, "<i", 3)),
    ("idx", edited(26, "<ii", 3, 3)),
    ("idx", edited(26 + 12, "<q", 2)),  # and its place
    ("bin", edited(0, "<H", 200)),  # no token of the dictionary
]
CACHED = [
    ("idx", edited(8, "<Q", 2)),
    ("idx", edited(16, "<Q", 99)),
    ("idx", edited(24, "<Q", 8)),
    ("idx", edited(32, "<Q", 2)),
    ("idx", edited(40, "<Q", 1 << 60)),
    ("idx", edited(48 + 4 * 8 + 8, "<q", 3)),
    ("idx", edited(48 + 8 * 8, "<q", -1)),
    ("bin", edited(0, "<i", 200)),
    ("bin", edited(0, "<i", 0)),
]


@pytest.mark.parametrize(
    ("impl", "ending", "damage"),
    [(impl, *case) for impl in IMPLS for case in CUT + (MMAP if impl == "mmap" else CACHED)],
)
@pytest.mark.parametrize("given", [True, False])
def test_damage_is_named(
    impl: str, ending: str, damage: Callable[[bytes], bytes], given: bool, tmp_path: Path
) -> None:
    """Whether --dataset-impl is given or not."""
    write(tmp_path / "train", impl)
    file = tmp_path / f"train.{ending}"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        read(tmp_path / "train", impl if given else None)
    assert "\n" not in str(caught.value)


def test_the_wrong_reader_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train", "mmap")
    with pytest.raises(UserError, match=r"--dataset-impl cached: \S+ is of mmap data; leave the flag out"):
        read(tmp_path / "train", "cached")


def test_data_of_a_larger_dictionary_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", "mmap")
    with pytest.raises(UserError, match="train.bin holds token 9, and its dictionary has 9 entries"):
        read(tmp_path / "train", entries=5)


def test_places_beyond_two_gigabytes(tmp_path: Path) -> None:
    """numpy's whole numbers of 32 bits, as they are read from a worker's part, would wrap around."""
    builder = make_builder(f"{tmp_path / 'train'}.bin", "mmap", vocab_size=100)
    size = (1 << 30) - 1
    builder._sizes = [np.int32(size)] * 4
    builder.finalize(f"{tmp_path / 'train'}.idx")
    index = MMapIndexedDataset.Index(f"{tmp_path / 'train'}.idx")
    assert [int(index[i][0]) for i in range(4)] == [2 * size * i for i in range(4)]


@pytest.mark.parametrize("impl", ["lazy", "cached"])
def test_older_data_is_read_one_by_one(impl: str, tmp_path: Path) -> None:
    """As it is asked for on the command line, by a member of an enumeration."""
    write(tmp_path / "train", "cached")
    data = load_indexed_dataset(str(tmp_path / "train"), None, DATASET_IMPL_CHOICES(impl))
    assert [data[i].tolist() for i in range(len(data))] == SENTENCES
