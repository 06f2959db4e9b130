"""train_spm.py and encode_spm.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from prep_scripts import Scripts

TEXT = [
    f"the {size} {thing} reads {count} lines"
    for size in ("small", "large", "über")
    for thing in ("model", "file", "Straße")
    for count in range(40)
]


def train(scripts: Scripts, prefix: str, *options: object) -> sentencepiece.SentencePieceProcessor:
    scripts.write("in.txt", *TEXT)
    scripts.run("train_spm.py", "--input", "in.txt", "--model-prefix", prefix, "--vocab-size", 60, *options)
    return sentencepiece.SentencePieceProcessor(model_file=str(scripts.folder / f"{prefix}.model"))


def encode(scripts: Scripts, prefix: str, *lines: str) -> list[str]:
    scripts.write("x", *lines)
    scripts.run("encode_spm.py", "--model", f"{prefix}.model", "--input", "x", "--output", "y")
    return (scripts.folder / "y").read_text("utf-8").split("\n")[:-1]


def test_training_is_deterministic_wherever_it_runs(scripts: Scripts, tmp_path: Path) -> None:
    elsewhere = Scripts(tmp_path / "elsewhere")
    elsewhere.folder.mkdir()
    train(scripts, "a")
    train(elsewhere, "b")
    for suffix in ("model", "dict.txt"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (elsewhere.folder / f"b.{suffix}").read_bytes()


def test_the_dictionary_has_every_piece_and_a_round_size(scripts: Scripts) -> None:
    processor = train(scripts, "a")
    symbols = [line.split(" ")[0] for line in (scripts.folder / "a.dict.txt").open(encoding="utf-8")]
    assert symbols[: processor.get_piece_size() - 1] == [
        processor.id_to_piece(i) for i in range(1, processor.get_piece_size())
    ]
    assert (len(symbols) + 4) % 8 == 0 and len(set(symbols)) == len(symbols)
    encoded = encode(scripts, "a", *TEXT[:5])
    assert set(" ".join(encoded).split(" ")) <= set(symbols)
    assert processor.decode([line.split(" ") for line in encoded]) == TEXT[:5]


def test_fairseq_reads_the_dictionary(scripts: Scripts) -> None:
    fairseq_data = pytest.importorskip("fairseq.data")
    train(scripts, "a")
    dictionary = fairseq_data.Dictionary.load(str(scripts.folder / "a.dict.txt"))
    for line in encode(scripts, "a", *TEXT[:5]):
        assert dictionary.unk() not in dictionary.encode_line(line, add_if_not_exist=False).tolist()


def test_unknown_characters(scripts: Scripts) -> None:
    train(scripts, "plain")
    assert encode(scripts, "plain", "the \u4e2d")[0].endswith("<unk>")
    processor = train(scripts, "bytes", "--byte-fallback", "--vocab-size", 320)
    pieces = encode(scripts, "bytes", "the \u4e2d")[0].split(" ")
    assert pieces[-3:] == ["<0xE4>", "<0xB8>", "<0xAD>"] and processor.decode(pieces) == "the \u4e2d"


def test_empty_lines_stay_and_workers_change_nothing(scripts: Scripts) -> None:
    train(scripts, "a")
    assert encode(scripts, "a", "the file", "", "the model")[1] == ""
    scripts.write("x", *TEXT * 20)
    for threads in (1, 3):
        scripts.run(
            "encode_spm.py",
            "--model",
            "a.model",
            "--input",
            "x",
            "--output",
            f"y{threads}",
            "--workers",
            threads,
        )
    assert (scripts.folder / "y1").read_bytes() == (scripts.folder / "y3").read_bytes()


def test_long_lines_go_from_both_sides(scripts: Scripts) -> None:
    train(scripts, "a")
    scripts.write("x.en", "the file", "the " * 50, "the model")
    scripts.write("x.de", "the model", "the", "the file")
    files = ["--model", "a.model", "--input", "x.en", "x.de", "--output", "y.en", "y.de"]
    printed = scripts.run("encode_spm.py", *files, "--max-pieces", 20)
    assert "read 3, kept 2, too long 1" in printed
    assert [len((scripts.folder / f"y.{lang}").read_text().splitlines()) for lang in ("en", "de")] == [2, 2]


def test_errors(scripts: Scripts) -> None:
    scripts.write("in.txt", *TEXT)
    trained = ["--input", "in.txt", "--model-prefix", "m"]
    message = scripts.fails("train_spm.py", *trained, "--vocab-size", 5000)
    assert "--vocab-size 5000: Vocabulary size" in message
    for flag, value, least in (("vocab-size", 0, 2), ("padding-factor", 0, 1), ("max-sentences", 9, 101)):
        message = scripts.fails("train_spm.py", *trained, f"--{flag}", value)
        assert f"--{flag} must be at least {least} and at most" in message and f"got {value}" in message
    scripts.write("blank.txt", "", "")
    blank = scripts.fails("train_spm.py", *trained, "--input", "blank.txt")
    assert "blank.txt: empty lines only" in blank
    (scripts.folder / "latin.txt").write_bytes(b"gut\n\xfcber\n")
    assert "latin.txt:2: not UTF-8" in scripts.fails(
        "train_spm.py", *trained, "--input", "in.txt", "latin.txt"
    )
    assert "--character-coverage must be in (0, 1], got 2.0" in scripts.fails(
        "train_spm.py", *trained, "--character-coverage", 2
    )
    encoded = ["--model", "in.txt", "--input", "in.txt", "--output", "y"]
    assert "in.txt: not a sentencepiece model" in scripts.fails("encode_spm.py", *encoded)
    (scripts.folder / "empty").touch()
    message = scripts.fails("encode_spm.py", *encoded, "--model", "empty")
    assert "empty: not a sentencepiece model" in message
    assert "give one or two inputs" in scripts.fails(
        "encode_spm.py", *encoded, "z", "--input", *["in.txt"] * 2, "--output", "z"
    )
    assert "none.model: No such file" in scripts.fails("encode_spm.py", *encoded, "--model", "none.model")
