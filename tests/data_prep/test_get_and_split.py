"""split_tsv.py, sample_pairs.py, lm_documents.py, cldr_pairs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from prep_scripts import Scripts


def read(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_split_tsv(scripts: Scripts) -> None:
    scripts.write("in.tsv", "a\td\tui\tone\teins", "b\td\tui\ttwo\tzwei", "a\td\tui\tthree\tdrei")
    out = ["--source-out", "o.en", "--target-out", "o.de"]
    assert scripts.run("split_tsv.py", "--tsv", "in.tsv", *out) == "split_tsv: rows 3\n"
    counted = scripts.run("split_tsv.py", "--tsv", "in.tsv", "--group-column", 1, *out)
    assert counted == "split_tsv: rows 3, a 2, b 1\n"
    assert read(scripts.folder / "o.en") == ["one", "two", "three"]
    assert read(scripts.folder / "o.de") == ["eins", "zwei", "drei"]
    for name in ("o.en", "o.de"):
        (scripts.folder / name).unlink()
    message = scripts.fails("split_tsv.py", "--tsv", "in.tsv", "--columns", 4, 6, *out)
    assert "in.tsv:1: 5 columns, column 6 is needed" in message


def test_sample_pairs_is_fixed_and_in_order(scripts: Scripts) -> None:
    scripts.write("in.en", *map(str, range(1000)))
    scripts.write("in.de", *(f"x{i}" for i in range(1000)))
    paths = ["--source", "in.en", "--target", "in.de", "--source-out", "o.en", "--target-out", "o.de"]
    runs = []
    for seed in (1, 1, 2):
        scripts.run("sample_pairs.py", *paths, "--size", 50, "--seed", seed)
        runs.append(read(scripts.folder / "o.en"))
        assert [f"x{line}" for line in runs[-1]] == read(scripts.folder / "o.de")
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 50 and runs[0] == sorted(runs[0], key=int)
    assert "kept 1000" in scripts.run("sample_pairs.py", *paths, "--size", 5000)


def test_documents_stay_whole_and_in_one_split(scripts: Scripts) -> None:
    documents = [[f"document {i} begins", f"and\u00a0ends {i}"] for i in range(300)]
    text = [line for document in documents for line in [*document, ""]]
    scripts.write("in.txt", "", *text, "", "document 7 begins", "and ends 7")
    percents = ["--valid-percent", 10, "--test-percent", 20]
    printed = scripts.run("lm_documents.py", "--input", "in.txt", "--out-prefix", "o", *percents)
    assert "documents 301, too short 0, duplicate 1" in printed
    parts = {name: (scripts.folder / f"o.{name}").read_text("utf-8") for name in ("train", "valid", "test")}
    assert all(text.endswith("\n\n") and "\n\n\n" not in text for text in parts.values())
    found = [document for text in parts.values() for document in text.strip().split("\n\n")]
    assert sorted(found) == sorted(f"document {i} begins\nand ends {i}" for i in range(300))
    sizes = {name: text.count("\n\n") for name, text in parts.items()}
    assert 15 < sizes["valid"] < 50 and 40 < sizes["test"] < 80

    scripts.write("in.txt", *text[300:])  # half of the documents are gone: the others stay where they were
    scripts.run("lm_documents.py", "--input", "in.txt", "--out-prefix", "p", *percents)
    for name, before in parts.items():
        after = (scripts.folder / f"p.{name}").read_text("utf-8")
        assert set(after.split("\n\n")) <= set(before.split("\n\n"))


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], [], "in.txt: file is empty"),
        (["one paragraph", "another"], [], "in.txt: 2 different paragraphs are too few to hold some out"),
        (["x"], ["--test-percent", 60], "--test-percent must be between 0 and 50, got 60"),
    ],
)
def test_document_errors(scripts: Scripts, lines: list[str], options: list[object], message: str) -> None:
    scripts.write("in.txt", *lines)
    assert message in scripts.fails("lm_documents.py", "--input", "in.txt", "--out-prefix", "o", *options)


def cldr(scripts: Scripts, prefix: str, lang: str, *options: object) -> dict[str, list[str]]:
    sizes = ["--train", 400, "--valid", 50, "--test", 60]
    scripts.run("cldr_pairs.py", "--target-lang", lang, "--out-prefix", prefix, *sizes, *options)
    return {
        f"{split}.{side}": read(scripts.folder / f"{prefix}.{split}.{side}")
        for split in ("train", "valid", "test")
        for side in ("en", lang)
    }


@pytest.mark.parametrize("lang", ["de", "zh"])
def test_cldr_splits_are_disjoint_on_both_sides(scripts: Scripts, lang: str) -> None:
    made = cldr(scripts, "c", lang)
    assert [len(made[f"{split}.{lang}"]) for split in ("train", "valid", "test")] == [400, 50, 60]
    for side in ("en", lang):
        lines = [line for split in ("train", "valid", "test") for line in made[f"{split}.{side}"]]
        assert len(set(lines)) == len(lines) == 510
        assert not any(set(line) & set("\u00a0\u202f\t") or line != line.strip() for line in lines)


def test_cldr_is_seeded_and_test_does_not_depend_on_the_size_of_train(scripts: Scripts) -> None:
    made = cldr(scripts, "a", "de")
    assert cldr(scripts, "b", "de") == made
    assert cldr(scripts, "c", "de", "--seed", 7) != made
    larger = cldr(scripts, "d", "de", "--train", 800)
    assert larger["test.de"] == made["test.de"] and larger["valid.en"] == made["valid.en"]
    assert larger["train.de"][:400] == made["train.de"]


def test_cldr_says_that_it_is_synthetic_and_refuses_nonsense(scripts: Scripts) -> None:
    assert "SYNTHETIC" in scripts.run("cldr_pairs.py", "--help")
    options = ["--out-prefix", "c", "--target-lang"]
    assert "'xx' is unknown to Babel" in scripts.fails("cldr_pairs.py", *options, "xx")
    message = scripts.fails("cldr_pairs.py", *options, "de", "--valid", 0)
    assert "--valid must be from 1 to 10000000, got 0" in message
