"""Dictionaries: whole, and those of the training."""

import io
import re
import shutil
from pathlib import Path

import pytest
from commands import run
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.data import Dictionary
from fairseq.data.data_utils import infer_language_pair
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from stock import LANGUAGE

from xmoe_fairseq_compat.dictionaries import check_dictionaries, trained_on
from xmoe_fairseq_compat.errors import UserError

CPU = ("--cpu", "--num-workers", 0)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (b"a 3\nb\n", 2, "must be a token, a space and its count (0 or more), got 'b'"),
        (b"a 3\n\nb 2\n", 2, "must be a token, a space and its count (0 or more), got ''"),
        (b"a -3\n", 1, "must be a token, a space and its count (0 or more), got 'a -3'"),
        (b"a 3\nb many\n", 2, "must be a token, a space and its count (0 or more), got 'b many'"),
        (b"a 3\nb 2\na 1\n", 3, "Duplicate of 'a'; leave one out"),
        (b"a 3\n\xff\xfeb 2\n", 2, "not UTF-8"),
    ],
)
def test_bad_dictionaries_are_refused_with_the_line(
    content: bytes, line: int, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "dict.txt").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'dict.txt'}, line {line}: {problem}")):
        Dictionary.load(str(tmp_path / "dict.txt"))


def test_a_missing_dictionary_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read dictionary {tmp_path / 'dict.txt'}: No such file"):
        Dictionary.load(str(tmp_path / "dict.txt"))


def test_good_dictionaries_are_read() -> None:
    """From a file object too; white space in a token, a count of 0, and the flag that replaces an entry."""
    read = Dictionary.load(io.StringIO("a b 3\nc 0\n<unk> 5 #fairseq:overwrite\n"))
    assert read.symbols[4:] == ["a b", "c", "<unk>"] and read.count[4:] == [3, 0, 5]


def reordered(data: Path, folder: Path, name: str = "dict.txt") -> Path:
    shutil.copytree(data, folder)
    first, *rest = (data / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join([*rest, first]))
    return folder


@pytest.mark.parametrize("command", ["fairseq-eval-lm", "fairseq-validate"])
def test_a_reordered_dictionary_is_refused(
    command: str, corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    data = reordered(corpus[1], tmp_path / "data")
    flags = (data, "--path", stock_models[1], *CPU, "--batch-size", 4)
    last = run(command, *flags, succeeds=False).splitlines()[-1]
    assert f"{data / 'dict.txt'} is not the dictionary that the model was trained with: its entries" in last
    with (data / "dict.txt").open("a") as file:
        file.write("more 1\n")
    last = run(command, *flags, succeeds=False).splitlines()[-1]
    assert "it has 41 entries, the model's 40" in last


def test_the_dictionary_of_one_side_is_named(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    data = reordered(corpus[0], tmp_path / "data", "dict.de.txt")
    output = run("fairseq-generate", data, "--path", stock_models[0], *CPU, succeeds=False)
    assert f"error: {data / 'dict.de.txt'} is not the dictionary" in output.splitlines()[-1]


def test_training_goes_on_with_the_same_dictionary_only(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    data = reordered(corpus[1], tmp_path / "data")
    flags = (data, *LANGUAGE, "--max-update", 5, "--save-dir", tmp_path / "saved")
    output = run("fairseq-train", *flags, "--restore-file", stock_models[1], succeeds=False)
    assert "is not the dictionary" in output.splitlines()[-1] and "Traceback" not in output
    output = run("fairseq-train", *flags, "--finetune-from-model", stock_models[1])
    assert re.search(r"WARNING .* is not the dictionary", output)


def test_a_checkpoint_without_dictionaries_is_taken_as_it_is(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch

    state = load_checkpoint_to_cpu(str(stock_models[1]))
    assert state["task_state"].pop("trained_on")["source"]["entries"] == 40
    torch.save(state, tmp_path / "old.pt")
    data = reordered(corpus[1], tmp_path / "data")
    assert "Perplexity" in run("fairseq-eval-lm", data, "--path", tmp_path / "old.pt", *CPU)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["train.de-en.de.idx", "train.en-fr.fr.idx"], "holds de-en, en-fr; give --source-lang"),
        (["train.idx", "dict.txt"], "holds no pair of languages"),
    ],
)
def test_an_unclear_language_pair_is_refused(files: list[str], problem: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=problem):
        infer_language_pair(str(tmp_path))


def test_a_language_pair_is_inferred(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    assert infer_language_pair(str(corpus[0])) == ["en", "de"]
    with pytest.raises(UserError, match=f"cannot read data folder {tmp_path / 'nowhere'}: No such file"):
        infer_language_pair(str(tmp_path / "nowhere"))


def test_a_task_may_have_no_dictionaries() -> None:
    """And go on from its own checkpoint, or from one of a task that has them."""
    task = FairseqTask(FairseqDataclass())
    assert trained_on(task) == {}
    check_dictionaries(task, {"source": {"entries": 4, "digest": "of text"}})
