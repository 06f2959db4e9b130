"""outputs.py, and every command of data-prep: nothing is written over what is read, or by halves."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import textio
from outputs import atomic_files, atomic_writers, write_bytes
from prep_scripts import PREP, Fails

# For each command flags with an input IN and an output OUT: one file.
SAME_FILE = {
    "clean_pairs": "--source IN --target b --source-out OUT --target-out o",
    "drop_near_paragraphs": "--input IN --held-out b --output OUT",
    "encode_gpt2": "--encoder-json b --vocab-bpe b --input IN --output OUT",
    "encode_spm": "--model b --input IN --output OUT",
    "extract_english": "--list IN --output OUT --sources-out o",
    "extract_pairs": "--sources IN --folder . --lang de --output OUT",
    "fetch_packages": "--list IN --tiers open --task mt --folder . --sources-out OUT",
    "folder_files": "--folder . --files IN --output OUT",
    "hold_out_pairs": "--source b --target IN --languages en de --out-prefix o --counts OUT",
    "lm_documents": "--input IN --out-prefix o --counts OUT",
    "manifest": "--about x --task mt --sources b --files IN --output OUT",
    "mtdata_parts": "--mtdata x --recipes IN --recipe r --langs en de --iso eng deu --folder . --counts OUT",
    "sample_pairs": "--source b --target IN --source-out o --target-out OUT --size 1",
    "split_pairs": "--input IN --lang de --out-prefix o --counts OUT",
    "split_tsv": "--tsv IN --source-out o --target-out OUT",
    "train_spm": "--input b IN --model-prefix o --counts OUT",
}
# These read no file that a flag names.
TWO_OUTPUTS = {
    "cldr_pairs": "--target-lang de --out-prefix o --counts o.train.de",
    "hub_files": "--repo a/b --revision x --patterns x --folder . --task x --licence x --counts files.txt",
    "wmt_testsets": "--sets wmt14 --langpair en-de --source-out o --target-out o",
}


def test_every_command_is_in_the_tables() -> None:
    commands = {path.stem for path in PREP.glob("*.py") if "run(main)" in path.read_text()}
    assert commands == {*SAME_FILE, *TWO_OUTPUTS, "normalize"}  # which prints


@pytest.mark.parametrize("name", SAME_FILE)
def test_no_command_writes_over_its_input(fails: Fails, name: str) -> None:
    Path("soft").symlink_to("a")
    os.link("a", "hard")
    for output in ("a", "./a", "soft", "hard"):
        flags = SAME_FILE[name].replace("IN", "a").replace("OUT", output).split()
        assert f"{Path(output)}: is the input a, which would be overwritten" in fails(name, *flags)


@pytest.mark.parametrize("name", TWO_OUTPUTS)
def test_two_outputs_are_two_files(fails: Fails, name: str) -> None:
    if name == "hub_files":
        pytest.importorskip("huggingface_hub")
    assert "named for two outputs" in fails(name, *TWO_OUTPUTS[name].split())


def test_names_of_one_file(fails: Fails) -> None:
    out = ["--source", "a", "--target", "b", "--target-out", "o", "--source-out"]
    Path("soft").symlink_to("o")
    for other in ("o", "x/../o", "soft"):
        assert "named for two outputs" in fails("clean_pairs", *out, other)
    Path("o.tmp").write_text("text\n")
    message = fails("clean_pairs", "--source", "o.tmp", "--target", "b", *out[4:], "p")
    assert "o: is the input o.tmp" in message


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("b/c", "b"),  # below a file
        ("x" * 300, "File name too long"),
        (".", "is no regular file"),
        ("/dev/null", "/dev/null: is no regular file"),
        ("/dev/full", "/dev/full: is no regular file"),
    ],
)
def test_outputs_that_cannot_be(fails: Fails, output: str, why: str) -> None:
    assert why in fails("drop_near_paragraphs", "--input", "a", "--held-out", "b", "--output", output)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    (tmp_path / "o").write_text("of an earlier run")
    with pytest.raises(textio.DataError, match="o: cannot be written: "), atomic_writers([tmp_path / "o"]):
        raise OSError(number, os.strerror(number))
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert (tmp_path / "o").read_text() == "of an earlier run"


@pytest.mark.parametrize(
    ("suffix", "unpack"), [("", bytes), (".gz", gzip.decompress), (".xz", lzma.decompress)]
)
def test_what_is_named_packed_is_packed(
    tmp_path: Path, suffix: str, unpack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"o{suffix}"
    packed = []
    for _ in range(2):
        with atomic_writers([path]) as (file,):
            file.write("Straße\n")
        packed.append(path.read_bytes())
        assert unpack(packed[-1]) == "Straße\n".encode()
        assert list(textio.read_lines(path)) == ["Straße"]
    assert packed[0] == packed[1]
    write_bytes(path, b"[1]")
    assert unpack(path.read_bytes()) == b"[1]" and textio.read_json(path) == [1]


def test_several_outputs_are_never_of_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two renames: one file, or the first ones gone, but no old one beside a new one."""
    names = [tmp_path / name for name in ("train", "valid", "test")]
    for path in names:
        path.write_text("old")
    plain = os.replace

    def killed(path: str, target: Path) -> None:
        if target.name == "valid":
            raise KeyboardInterrupt
        plain(path, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), atomic_files(names) as files:
        for file in files:
            file.write(b"new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"test": "new"}


def test_interrupted_cldr_pairs_leave_no_split(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    import cldr_pairs

    draws = iter(range(40))
    plain = cldr_pairs.Generator.draw

    def draw(generator: object) -> object:
        if next(draws) == 30:  # with test and valid done
            raise textio.DataError("stopped")
        return plain(generator)

    monkeypatch.setattr(cldr_pairs.Generator, "draw", draw)
    sizes = ["--test", 5, "--valid", 5, "--train", 50]
    assert "stopped" in fails("cldr_pairs", "--target-lang", "de", "--out-prefix", "o", *sizes)
