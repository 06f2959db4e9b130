"""fairseq-preprocess takes text that is text, two sides of one length, and one dictionary for a folder."""

import re
from pathlib import Path

import fairseq_cli.preprocess
import pytest
from fairseq import options

from xmoe_fairseq_compat import preprocess
from xmoe_fairseq_compat.errors import UserError


def binarise(*flags: object) -> None:
    parser = options.get_preprocessing_parser()
    fairseq_cli.preprocess.main(parser.parse_args(["--workers", "1", *map(str, flags)]))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.en").write_text("a b\nc\n")
    (tmp_path / "text.de").write_text("A B\nC\n")
    return tmp_path / "text"


@pytest.mark.parametrize(
    ("content", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\nb", 3), ("ä\nö\n".encode(), 2)]
)
def test_lines_are_counted(
    content: bytes, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that may cut a character."""
    monkeypatch.setattr(preprocess, "BLOCK", 1)
    (tmp_path / "text").write_bytes(content)
    assert preprocess.count_lines(str(tmp_path / "text")) == lines


@pytest.mark.parametrize("content", [b"a\nb\n\xff\xfe", b"a\nb\n\xc3"])
def test_bytes_that_are_no_text_are_refused(content: bytes, text: Path, tmp_path: Path) -> None:
    Path(f"{text}.en").write_bytes(content)
    with pytest.raises(UserError, match=r"text\.en, line \d or later: not UTF-8"):
        binarise("--only-source", "-s", "en", "--trainpref", text, "--destdir", tmp_path / "bin")


def test_missing_text_and_unequal_sides_are_named(text: Path, tmp_path: Path) -> None:
    pair = ("-s", "en", "-t", "de", "--destdir", tmp_path / "bin")
    Path(f"{text}.de").write_text("A B\n")
    message = f"--trainpref: both sides must have as many lines; {text}.en has 2, {text}.de has 1"
    with pytest.raises(UserError, match=re.escape(message)):
        binarise(*pair, "--trainpref", text)
    Path(f"{text}.de").unlink()
    with pytest.raises(UserError, match=f"cannot read {text}.de: No such file"):
        binarise(*pair, "--trainpref", text)
    with pytest.raises(UserError, match="--trainpref must be set if --srcdict is not specified"):
        binarise(*pair)


def test_a_folder_has_one_dictionary(text: Path, tmp_path: Path) -> None:
    """Another would leave sets behind whose numbers mean other words."""
    folder = tmp_path / "bin"
    pair = ("-s", "en", "-t", "de", "--destdir", folder)
    binarise(*pair, "--joined-dictionary", "--trainpref", text, "--validpref", f"{text},{text}")
    with pytest.raises(UserError, match=f"{folder / 'dict.en.txt'} is there already; to add sets give it as"):
        binarise(*pair, "--trainpref", text)

    def dictionaries(file: Path) -> tuple[object, ...]:
        return ("--srcdict", file, "--tgtdict", file)

    binarise(*pair, *dictionaries(folder / "dict.en.txt"), "--testpref", text)
    assert {path.name.split(".")[0] for path in folder.glob("*.idx")} == {"train", "valid", "valid1", "test"}
    first, *rest = (folder / "dict.en.txt").read_text().splitlines(keepends=True)
    other = tmp_path / "other.txt"
    other.write_text("".join([*rest, first]))
    with pytest.raises(UserError, match=f"would keep test, valid1 of its present .*, and {other} is another"):
        binarise(*pair, *dictionaries(other), "--trainpref", text, "--validpref", text)
    every = ("--trainpref", text, "--validpref", f"{text},{text}", "--testpref", text)
    binarise(*pair, *dictionaries(other), *every)
    assert (folder / "dict.de.txt").read_text() == other.read_text()
