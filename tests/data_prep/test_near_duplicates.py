"""near_duplicates.py, split_pairs.py, drop_near_paragraphs.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from near_duplicates import NearDuplicates, word_pairs
from prep_scripts import Scripts

VOCABULARY = "the a file page window opens closes shows large small new old of in with user key".split(" ")  # noqa: SIM905


def texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(VOCABULARY[:8], k=generator.randrange(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.75, 1.0])
def test_the_search_finds_exactly_what_comparing_all_finds(threshold: float) -> None:
    held, asked = texts(300, 1), texts(300, 2)
    near = NearDuplicates(((text,) for text in held), threshold)
    sets = [word_pairs(text) for text in held]

    def by_comparing(text: str) -> bool:
        mine = word_pairs(text)
        return any(len(mine & other) / len(mine | other) >= threshold for other in sets)

    expected = [by_comparing(text) for text in asked]
    assert [(text,) in near for text in asked] == expected
    assert 10 < sum(expected) <= 300


def test_numbers_case_and_placeholders_do_not_make_a_difference() -> None:
    near = NearDuplicates([("Found 12 files in %s", "Es gibt %d Dateien")], 1.0)
    assert ("found 7 FILES in %(name)s!", "x") in near
    assert ("something else", "Es gibt %s Dateien.") in near
    assert ("found some files", "Dateien") not in near


def rows(scripts: Scripts) -> Path:
    generator = random.Random(3)
    lines: dict[str, str] = {}
    for group in range(120):
        kind = "ui" if group % 3 == 0 else "prose"
        for number in range(1 + group % 4):
            words = generator.choices(VOCABULARY, k=generator.randrange(2, 8))
            if generator.random() < 0.3 and lines:  # nearly what another group has
                words = [*generator.choice(list(lines)).split(), str(group)]
            english = " ".join(words)
            lines.setdefault(
                english, f"s\tg{group}\t{kind}\t{english}\t{' '.join(word[::-1] for word in words)} {number}"
            )
    return scripts.write("pairs.tsv", *lines.values())


def splits(scripts: Scripts) -> dict[str, list[tuple[str, str]]]:
    read = {n: (scripts.folder / f"o.{n}").read_text("utf-8").splitlines() for n in all_names()}
    return {s: list(zip(read[f"{s}.en"], read[f"{s}.de"], strict=True)) for s in ("train", "valid", "test")}


def all_names() -> list[str]:
    return [f"{split}.{side}" for split in ("train", "valid", "test") for side in ("en", "de")]


def test_groups_stay_whole_and_training_has_nothing_near_the_test(scripts: Scripts) -> None:
    path = rows(scripts)
    options = ["--input", path, "--lang", "de", "--out-prefix", "o", "--valid", 32, "--test", 40]
    printed = scripts.run("split_pairs.py", *options)
    made = splits(scripts)
    assert scripts.run("split_pairs.py", *options, "--workers", 2) == printed and splits(scripts) == made
    group_of: dict[tuple[str, str], set[str]] = {}
    kind_of = {}
    for line in path.read_text("utf-8").splitlines():
        _, group, kind, english, german = line.split("\t")
        group_of.setdefault((english, german), set()).add(group)
        kind_of[group] = kind
    groups = {name: set().union(*(group_of[pair] for pair in pairs)) for name, pairs in made.items()}
    assert not groups["test"] & groups["train"] and not groups["valid"] & groups["train"]
    assert not groups["valid"] & groups["test"]
    assert 40 <= len(made["test"]) <= 45 and len(made["valid"]) >= 20
    prose = sum(kind_of[next(iter(group_of[pair]))] == "prose" for pair in made["test"])
    assert 28 <= prose <= 33
    assert all(len(english.split()) >= 3 for english, _ in made["test"])
    near = NearDuplicates([*made["test"], *made["valid"]], 0.6)
    assert made["train"] and not any(pair in near for pair in made["train"])
    assert not any(pair in NearDuplicates(made["test"], 0.6) for pair in made["valid"])
    assert int(printed.split("near duplicates ")[1].split(",")[0]) > 0


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a\tb\tprose\tone two three\teins"], ["--test", 4], "no document group is small enough"),
        (["a\tb\tprose\tx"], [], "pairs.tsv:1: 4 columns, expected 5"),
        (["x"], ["--test", 0], "--test must be at least 1, got 0"),
        (["x"], ["--similarity", 0], "--similarity must be above 0 and at most 1, got 0.0"),
        (["x"], ["--prose-percent", 101], "--prose-percent must be in 0 to 100, got 101.0"),
    ],
)
def test_split_errors(scripts: Scripts, lines: list[str], options: list[object], message: str) -> None:
    scripts.write("pairs.tsv", *lines)
    fixed = ["--input", "pairs.tsv", "--lang", "de", "--out-prefix", "o"]
    assert message in scripts.fails("split_pairs.py", *fixed, *options)


def test_near_paragraphs_leave_the_training_documents(scripts: Scripts) -> None:
    scripts.write("test", "The window shows a large new page.", "")
    train = [
        "Something quite different here.",
        "The window shows a large new page!",
        "",
        "the window SHOWS a large new page",
        "",
    ]
    scripts.write("train", *train, "A third document about keys.", "")
    options = ["--input", "train", "--held-out", "test", "--output", "out"]
    printed = scripts.run("drop_near_paragraphs.py", *options)
    assert printed == "drop_near_paragraphs: paragraphs 4, near duplicates 2, kept 2, words 9\n"
    expected = "Something quite different here.\n\nA third document about keys.\n\n"
    assert (scripts.folder / "out").read_text("utf-8") == expected
    scripts.write("train", "The window shows a large new page!")
    (scripts.folder / "out").unlink()
    assert "every paragraph nearly occurs in test" in scripts.fails("drop_near_paragraphs.py", *options)
