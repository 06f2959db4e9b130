"""Inputs that are odd, broken or out of bounds: one line, and nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import textio
from outputs import check_files
from prep_scripts import Fails


@pytest.mark.parametrize(
    ("name", "why"),
    [("fifo", "fifo: is a pipe or device"), ("none", "none: No such file"), ("b/c", "b/c: Not a directory")],
)
def test_inputs_that_cannot_be(fails: Fails, name: str, why: str) -> None:
    os.mkfifo("fifo")
    assert why in fails("drop_near_paragraphs", "--input", name, "--held-out", "b", "--output", "o")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "{}", '[{"task": 5}]', "[" * 100_000, "\x00", '[{"task": "mt"', "1" * 5000]
)
@pytest.mark.parametrize("name", ["manifest", "extract_pairs", "extract_english"])
def test_broken_json(fails: Fails, name: str, text: str) -> None:
    Path("s.json").write_text(text)
    flags = {
        "manifest": "--about x --task mt --sources s.json --files a --output o",
        "extract_pairs": "--sources s.json --folder . --lang de --output o",
        "extract_english": "--list a --tiers x --sources s.json --folder . --output o --sources-out p",
    }
    assert "s.json: not " in fails(name, *flags[name].split())


def test_files_of_a_manifest(fails: Fails) -> None:
    Path("s.json").write_text(json.dumps([{"task": "mt"}]))
    flags = ["--about", "x", "--task", "mt", "--sources", "s.json", "--output", "new/o"]
    assert "a: is not in the manifest's folder new" in fails("manifest", *flags, "--files", "a")
    message = fails("manifest", *flags, "--files", "a", "--settings", "x")
    assert "--settings must be NAME=VALUE, got x" in message
    message = fails("folder_files", "--folder", "new", "--files", "a", "--output", "o")
    assert "a: is not in --folder new" in message


@pytest.mark.parametrize("value", [10**20, -(10**20), 0])
def test_numbers_out_of_bounds(fails: Fails, value: int) -> None:
    spm = ["--input", "a", "--model-prefix", "o"]
    for flag in ("--max-sentences", "--vocab-size", "--padding-factor"):
        assert f"{flag} must be at least" in fails("train_spm", *spm, flag, value)
    drop = ["--input", "a", "--held-out", "b", "--output", "o", "--workers", value]
    assert "--workers must be at least 1 and at most 1024" in fails("drop_near_paragraphs", *drop)


def test_inputs_may_be_one_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    check_files([tmp_path / "o", None], [tmp_path / "a", tmp_path / "a", None])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("drop_near_paragraphs --input utf16 --held-out b --output o", "utf16:1: holds NUL bytes"),
        ("drop_near_paragraphs --input a --held-out blank --output o", "blank: empty lines only"),
        ("drop_near_paragraphs --input loop --held-out b --output o", "loop: Too many levels of symbolic"),
        ("cldr_pairs --target-lang root --out-prefix o", "CLDR has too few names in both en and root"),
        ("cldr_pairs --target-lang de --out-prefix o --train 100000000000000", "--train must be from 1 to"),
        ("cldr_pairs --target-lang de --out-prefix .", "begins with two dots"),
        ("split_pairs --input a --lang \ud800 --out-prefix o", "no Unicode text"),
        ("extract_english --modules ../x --output o --sources-out p", "no Python package ../x"),
        (
            "mtdata_parts --mtdata x --recipes deep --recipe r --langs a b --iso a b --folder .",
            "not a list of",
        ),
        ("encode_gpt2 --encoder-json list --vocab-bpe b --dict o", "not GPT-2's encoder.json"),
        ("encode_gpt2 --encoder-json deep --vocab-bpe b --dict o", "not GPT-2's encoder.json"),
        (
            "split_tsv --tsv a --source-out o --target-out p --group-column -3",
            "--group-column must be at least 0",
        ),
        (
            "manifest --about x --task mt --sources s --output o --files a --counts c c",
            "named c, and one would",
        ),
        ("manifest --about x --task mt --sources s --output o --files a --packages =", "is not installed"),
        (
            "lm_documents --input half.jsonl --out-prefix o",
            'half.jsonl:1: not an object with a string "text"',
        ),
        (
            "lm_documents --input deep.jsonl --out-prefix o",
            'deep.jsonl:1: not an object with a string "text"',
        ),
    ],
)
def test_odd_input(fails: Fails, words: str, why: str) -> None:
    Path("utf16").write_bytes("text\n".encode("utf-16-le"))
    Path("blank").write_text(" \n\n")
    Path("loop").symlink_to("loop")
    Path("list").write_text("[]")
    Path("c").write_text("{}")
    Path("s").write_text('[{"task": "mt"}]')
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n')
    for name in ("deep", "deep.jsonl"):
        Path(name).write_text("[" * 100_000)
    if "encode_gpt2" in words:
        pytest.importorskip("fairseq")
    assert why in fails(*words.split())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo")
    assert list(textio.read_lines(tmp_path / "a")) == ["one", "\ufefftwo"]
