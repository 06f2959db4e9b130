"""Checkpoints that are not what they say: too large, overlapping, damaged, nested without end."""

import argparse
import contextlib
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from hostile import checkpoint

from xmoe_fairseq.parallel import shards, whole
from xmoe_fairseq.parallel.tool import main
from xmoe_fairseq_compat import saved_configuration
from xmoe_fairseq_compat.checkpoints import load, load_checkpoint
from xmoe_fairseq_compat.errors import CheckpointError


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


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


def test_xmoe_checkpoint_looks_for_flipped_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said_by(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["xmoe-checkpoint", *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            main()
        return "".join(capsys.readouterr())

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


def doubled(times: int) -> dict[str, Any]:
    node: dict[str, Any] = {str(number): number for number in range(1000)}
    for _ in range(times):
        node = {"left": node, "right": node}
    return node


def without_end() -> list[Any]:
    node: list[Any] = []
    node += [node, node]
    return node


def deep() -> list[Any]:
    node: list[Any] = []
    for _ in range(200):
        node = [node]
    return node


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (doubled(10), "entries that become 1,[0-9,]+ when they are read"),
        (without_end(), "is nested without end at cfg.task.node"),
        (deep(), "is nested without end at cfg.task.node"),
        ("${oc.env:HOME}", r"cfg.task.node is '\$\{oc.env:HOME\}', a reference"),
        (["${model}${model}"], "cfg.task.node.0 is .*, a reference"),
        ("${model}", "cfg.task.node is .*, a reference"),  # to many values
        ("${task.node}", "cfg.task.node is .*, a reference"),
        ("${task.none}", "cfg.task.node is .*, a reference"),
    ],
)
def test_a_configuration_that_grows_is_refused(node: Any, problem: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda state: state["cfg"]["task"].update(node=node))
    assert re.search(problem, refused(path))


def test_references_to_plain_values_are_followed(tmp_path: Path) -> None:
    """fairseq saved them until May 2021."""
    own = {"lr": [0.1, 0.2], "seed": None, "first": "${task.second}", "second": 3}
    asked = {"a": "${task.lr}", "b": ["${task.seed}"], "c": "${task.first}"}
    path = checkpoint(tmp_path, lambda state: state["cfg"]["task"].update(own, asked=asked))
    task = load_checkpoint(path)["cfg"]["task"]
    assert task["asked"] == {"a": [0.1, 0.2], "b": [None], "c": 3} and task["first"] == 3
    assert task["asked"]["a"] is not task["lr"]


def test_an_honest_configuration_may_be_large_and_share_parts() -> None:
    pairs = [f"en-l{number}" for number in range(200_000)]
    saved_configuration.check_configuration(
        "file", {"task": {"lang_pairs": pairs}, "model": {"lang_pairs": pairs}}
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"extra_state": "DROP"}, "it has no entry 'extra_state'"),
        ({"cfg": "DROP", "args": "DROP"}, "it has no entry 'cfg'"),
        ({"cfg": None}, "its entry 'cfg' is 'None'"),
        ({"cfg": [1]}, r"its entry 'cfg' is '\[1\]'"),
        ({"model": {5: torch.ones(1)}}, "its model holds 5, where the name of a tensor belongs"),
        (
            {"args": argparse.Namespace(arch="xmoe_of_old")},
            "'xmoe_of_old' .if that is a model or task, add its",
        ),
        ({"model": [1]}, r"its entry 'model' is '\[1\]'"),
        ({"optimizer_history": []}, "its entry 'optimizer_history' is"),
        ({"optimizer_history": [5]}, "cannot be read"),
        ({"optimizer_history": [{}]}, "cannot be read"),
        ({"cfg": {"task": {"eval_wer_config": 5}}}, "cannot be read"),
    ],
)
def test_a_checkpoint_without_its_parts(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """say_what_a_checkpoint_lacks"""

    def apply(state: dict[str, Any]) -> None:
        state.update(change)
        for name in [name for name, value in change.items() if value == "DROP"]:
            del state[name]

    path = checkpoint(tmp_path, apply)
    with pytest.raises(CheckpointError, match=problem) as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_file_that_may_not_be_read_stays_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
