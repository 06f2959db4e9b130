"""What one command from text to a model adds: held-out pairs, few documents, sizes that fit the text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
from prep_scripts import Fails, Scripts


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def pairs(count: int) -> list[tuple[str, str]]:
    """No two of them alike."""
    words = [f"{a}{b}{c}" for a in "klmnp" for b in "aeiou" for c in "rstvw"]
    texts = [" ".join(random.Random(i).choices(words, k=9)) for i in range(count)]
    return [(text, text.upper()) for text in texts]


@pytest.fixture
def held_out(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(scripts.folder)
    return scripts.folder


def hold_out(scripts: Scripts, found: list[tuple[str, str]], prefix: str = "o", *options: object) -> str:
    scripts.write("in.en", *(source for source, _ in found))
    scripts.write("in.de", *(target for _, target in found))
    files = ["--source", "in.en", "--target", "in.de", "--languages", "en", "de", "--out-prefix", prefix]
    return scripts.run("hold_out_pairs.py", *files, *options)


def split(folder: Path, name: str, prefix: str = "o") -> list[tuple[str, str]]:
    return list(zip(*(lines(folder / f"{prefix}.{name}.{x}") for x in ("en", "de")), strict=True))


def test_a_twentieth_each_and_every_pair_once(scripts: Scripts) -> None:
    found = pairs(400)
    long = ("x" * 401, "y")  # no batch must fail on a held-out side
    assert hold_out(scripts, [*found, long]) == (
        "hold_out_pairs: read 401, near duplicates 0, test 20, valid 20, train 361\n"
    )
    parts = {name: split(scripts.folder, name) for name in ("train", "valid", "test")}
    assert sorted(pair for part in parts.values() for pair in part) == sorted([*found, long])
    assert long in parts["train"] and parts["train"] == [p for p in [*found, long] if p in {*parts["train"]}]
    hold_out(scripts, found[:300], "p", "--workers", 2)  # what stays held out stays where it was, mostly
    assert len({*split(scripts.folder, "test", "p")} & {*parts["test"]}) >= 10


def test_no_split_has_what_nearly_occurs_in_another(scripts: Scripts) -> None:
    found = pairs(400)
    hold_out(scripts, found)
    test, valid = split(scripts.folder, "test"), split(scripts.folder, "valid")
    near = [(f"{test[0][0]}!", "other words"), ("quite other words", f"{valid[0][1]}.".lower())]
    near += [(test[1][0].upper(), "such words")]
    hold_out(scripts, [*found, *near], "p")
    parts = [split(scripts.folder, name, "p") for name in ("train", "valid", "test")]
    for side in (0, 1):  # whichever of two twins is held out, if the other was not dropped it is there, too
        known = [{pair[side].casefold().strip("!.") for pair in part} for part in parts]
        assert not known[0] & known[1] and not known[0] & known[2] and not known[1] & known[2]
    assert sum(map(len, parts)) < len(found) + len(near)


def test_one_split_may_have_files_of_its_own(scripts: Scripts) -> None:
    assert "read 40, near duplicates 0, valid 2, train 38" in hold_out(
        scripts, pairs(40), "o", "--splits", "valid"
    )
    assert not (scripts.folder / "o.test.en").exists()


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (
            pairs(19),
            "in.en: 19 pairs are left after cleaning, too few to hold some out; give 20 or more, or sets",
        ),
        ([("so it is", f"{i} x") for i in range(60)], "no pair is left for train: all are nearly the same"),
    ],
)
def test_too_little_to_hold_out(fails: Fails, found: list[tuple[str, str]], why: str) -> None:
    for number, name in enumerate(("in.en", "in.de")):
        Path(name).write_text("".join(f"{pair[number]}\n" for pair in found))
    files = ["--source", "in.en", "--target", "in.de", "--languages", "en", "de", "--out-prefix", "o"]
    assert why in fails("hold_out_pairs", *files)


def test_few_documents_are_cut_between_paragraphs(scripts: Scripts) -> None:
    paragraphs = [f"paragraph {i} has five words" for i in range(100)]
    scripts.write("in.txt", *paragraphs[:60], "", *paragraphs[60:])
    printed = scripts.run("lm_documents.py", "--input", "in.txt", "--out-prefix", "o", "--workers", 2)
    assert printed.startswith("lm_documents: few documents, so they are cut into parts of 2 words or more\n")
    assert "test 5," in printed and "valid 5," in printed and "train 90," in printed
    found = [
        line for name in ("train", "valid", "test") for line in lines(scripts.folder / f"o.{name}") if line
    ]
    assert sorted(found) == sorted(paragraphs)


def test_test_may_be_given_alone(scripts: Scripts) -> None:
    scripts.write("in.txt", *(f"paragraph {i}" for i in range(40)))
    scripts.write("test.txt", "paragraph 3", "and more", "", "another")
    options = ["--input", "in.txt", "--test-input", "test.txt", "--out-prefix", "o"]
    assert "test 2, test paragraphs 3" in scripts.run("lm_documents.py", *options)
    assert len(lines(scripts.folder / "o.valid")) == 4  # a twentieth of what is left
    scripts.write("in.txt", "another")
    scripts.write("valid.txt", "new text")
    assert "no document is left for train" in scripts.fails(
        "lm_documents.py", *options, "--valid-input", "valid.txt"
    )


def test_a_vocabulary_that_fits(scripts: Scripts) -> None:
    def size(*options: object) -> int:
        scripts.run(
            "train_spm.py", "--input", "in.txt", "--model-prefix", "m", "--vocab-size", "auto", *options
        )
        return sentencepiece.SentencePieceProcessor(
            model_file=str(scripts.folder / "m.model")
        ).get_piece_size()

    text = ["".join(random.Random(i).choices("abcdefghij ", k=60)) for i in range(200)]
    scripts.write("in.txt", *text)
    assert size() == int(2.4 * sum(map(len, text)) ** 0.5)
    scripts.write("in.txt", *(source for source, _ in pairs(400)))
    assert size() < int(2.4 * sum(len(source) for source, _ in pairs(400)) ** 0.5)  # it has not so many parts
    scripts.write("in.txt", *(chr(0x4E00 + i) * 3 + chr(0x4E00 + i % 7) for i in range(300)))
    assert 2 * 300 >= size() > 300  # as many as twice the characters, where there are so many
    scripts.write("in.txt", "ab")
    assert (size(), size("--byte-fallback")) == (4, 260)
    assert "invalid number_or_auto value" in scripts.start("train_spm.py", "--vocab-size", "x").stderr


def test_the_proportion_of_lengths_is_the_texts(scripts: Scripts) -> None:
    scripts.write("in.en", *(["a short line of English text"] * 50), "one word")
    scripts.write("in.zh", *(f"{chr(0x4E00 + i)}" * 4 for i in range(50)), "x" * 60)
    out = ["--source-out", "o.en", "--target-out", "o.zh", "--max-ratio", "1.5"]
    files = ["--source", "in.en", "--target", "in.zh", *out]
    assert "kept 0" not in (printed := scripts.run("clean_pairs.py", *files, "--target-chars", "auto"))
    assert "kept 50" in printed and "length ratio 1" in printed


def test_text_to_translate_is_normalised_as_training_was(scripts: Scripts) -> None:
    scripts.write("in.txt", "5\u00a0kg  of\u200b it", "")
    assert scripts.run("normalize.py", "in.txt") == "5 kg of it\n\n"
