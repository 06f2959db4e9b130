"""Checkpoints that are not what they say: too large, overlapping, damaged, nested without end."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call
from fairseq import checkpoint_utils
from hostile import checkpoint, refused

from xmoe_fairseq.parallel import shards, whole
from xmoe_fairseq.parallel.checkpoint_command import main
from xmoe_fairseq_compat.checkpoints import load, load_checkpoint
from xmoe_fairseq_compat.errors import CheckpointError


def repacked(path: Path, compression: int, change: dict[str, bytes] | None = None) -> Path:
    """The same zip file, packed anew, with some of its parts changed."""
    packed = path.with_name("packed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(entry.filename, (change or {}).get(name, old.read(entry)))
    return packed


@pytest.mark.parametrize("mmap", [False, True])
def test_a_deflated_checkpoint_reads_as_it_was_written(mmap: bool, tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    found = load(repacked(path, zipfile.ZIP_DEFLATED), mmap=mmap)
    for name, value in load(path)["model"].items():
        assert torch.equal(found["model"][name], value), name


def test_a_zip_that_expands_a_thousandfold_is_refused(tmp_path: Path) -> None:
    path = repacked(checkpoint(tmp_path), zipfile.ZIP_DEFLATED, {"data/0": bytes(2**25)})
    assert re.search(r"its [\d,]+ bytes would become 33,[\d,]+ when it is unpacked", refused(path))


def test_a_zip_whose_parts_overlap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlap.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(1000))
        for number in range(50):
            entry = zipfile.ZipInfo(f"a/data/{number}")
            entry.header_offset, entry.file_size, entry.compress_size, entry.CRC = 0, 1000, 1000, 1
            archive.filelist.append(entry)
    assert "its parts overlap: they claim 51,000 bytes" in refused(path)


def test_two_parts_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", b"1")
        archive.writestr("a/data.pkl", b"2")
    assert "it holds two parts of the same name" in refused(path)


def flip_a_bit_of_a_tensor(path: Path) -> str:
    """The name of the part of the zip file that holds it."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size * ("/data/" in entry.filename))
        start = path.read_bytes().index(archive.read(entry))
    content = bytearray(path.read_bytes())
    content[start + 5] ^= 16
    path.write_bytes(content)
    return entry.filename


@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_bit_in_a_tensor_is_found(mmap: bool, tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    name = flip_a_bit_of_a_tensor(path)
    assert f"it is damaged: {name} in it is not what was written" in refused(path, mmap=mmap)
    assert load_checkpoint(path, mmap=mmap, sums=False), "unless somebody wants to go without"
    with pytest.raises(CheckpointError, match="what was written"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_xmoe_checkpoint_looks_for_flipped_bits(tmp_path: Path) -> None:
    def said_by(*arguments: object) -> str:
        return call(main, "xmoe-checkpoint", *arguments)[1]

    path = checkpoint(tmp_path)
    flip_a_bit_of_a_tensor(path)
    assert "is not what was written" in said_by("merge", path, tmp_path / "new.pt")
    assert "holds no experts" in said_by("merge", path, tmp_path / "new.pt", "--skip-checksums")
    assert "0 updates, transformer_lm" in said_by("info", path)


def test_ranks_share_out_the_checksums_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    names = shards.shard_names("1-a", 3)
    for index in range(3):
        shards.write_shard({"model": {"w": torch.ones(9)}}, tmp_path, "1-a", index, 3)
    path = checkpoint(tmp_path, lambda state: state.update(expert_shards={"id": "1-a", "files": names}))
    assert [whole.damage(path, index, 2) for index in range(2)] == [None, None]
    flip_a_bit_of_a_tensor(tmp_path / names[1])  # the third of four files
    first, second = (whole.damage(path, index, 2) for index in range(2))
    assert str(tmp_path / names[1]) in str(first) and second is None
    flip_a_bit_of_a_tensor(path)
    assert str(path) in str(whole.damage(path, 0, 2))


def test_each_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    saved = torch.arange(6.0)
    torch.save({"a": saved}, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            found = load(path)
        except CheckpointError:
            continue
        assert torch.equal(found["a"], saved), place


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = checkpoint(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert load(path)["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "claim",
    [
        torch.zeros(1).expand(10**13),
        torch.zeros(1, dtype=torch.int8).expand(10**6, 10**6),
        torch.empty(10**13, device="meta"),
    ],
)
def test_a_tensor_that_claims_more_than_the_file_has(claim: torch.Tensor, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda state: state["model"].update(large=claim))
    assert re.search(r"model.large of shape .* claims 1?0?,?[\d,]+ bytes, the file has", refused(path))


class Large:
    """An array of 10^13 bytes, as a pickle asks for it."""

    def __init__(self, maker: Any, *arguments: Any) -> None:
        self.parts = (maker, arguments)

    def __reduce__(self) -> Any:
        return self.parts


@pytest.mark.parametrize(
    "claim",
    [
        Large(np.zeros(1).__reduce__()[0], np.ndarray, (10**13,), b"b"),
        Large(bytearray, 10**13),
        Large(torch.Tensor, 10**13),
    ],
)
def test_what_a_pickle_asks_for_without_having_it(claim: Any, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda state: state.update(large=claim))
    assert re.search(
        "claims (10,000,000,000,000 bytes|more memory than this machine has)|damaged", refused(path)
    )


def test_a_view_that_repeats_a_few_numbers_is_no_claim(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda state: state["model"].update(mask=torch.zeros(1).expand(1000, 1000)))
    assert load_checkpoint(path)["model"]["mask"].shape == (1000, 1000)


def test_a_file_that_may_not_be_read_stays_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
