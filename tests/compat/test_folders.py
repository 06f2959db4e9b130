"""Data and models that are used together have one dictionary."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run
from fairseq.data.legacy.masked_lm_dictionary import MaskedLMDictionary
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from stock import LANGUAGE

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.folders import check_folders


def test_folders_have_one_dictionary(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    same, other = (shutil.copytree(corpus[1], tmp_path / name) for name in ("same", "other"))
    first, *rest = (other / "dict.txt").read_text().splitlines(keepends=True)
    (other / "dict.txt").write_text("".join([*rest, first]))
    LanguageModelingTask.setup_task(LanguageModelingConfig(data=os.pathsep.join(map(str, (corpus[1], same)))))
    message = f"{other / 'dict.txt'} is another dictionary than {corpus[1] / 'dict.txt'}"
    with pytest.raises(UserError, match=re.escape(message)):
        LanguageModelingTask.setup_task(
            LanguageModelingConfig(data=os.pathsep.join(map(str, (corpus[1], other))))
        )


def test_a_dictionary_may_have_symbols_of_its_own(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """As that of fairseq's masked language models has a mask."""
    load = MaskedLMDictionary.load
    symbols = load(str(corpus[1] / "dict.txt"))
    task = SimpleNamespace(source_dictionary=symbols, target_dictionary=symbols, load_dictionary=load)
    shutil.copy(corpus[1] / "dict.txt", tmp_path)
    check_folders(task, [str(corpus[1]), str(tmp_path)])


def test_the_output_may_have_a_part_of_the_dictionary(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(corpus[1] / "dict.txt", tmp_path)
    cfg = LanguageModelingConfig(data=f"{corpus[1]}:{tmp_path}", output_dictionary_size=20)
    task = LanguageModelingTask.setup_task(cfg)
    assert len(task.target_dictionary) == 20
    (tmp_path / "dict.txt").write_text("other 3\n")
    with pytest.raises(UserError, match="another dictionary"):
        LanguageModelingTask.setup_task(cfg)


@pytest.mark.parametrize("fits", [True, False])
def test_a_language_model_must_have_the_targets_dictionary(
    fits: bool, corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Whose dictionary is read from dict.txt beside those of the languages."""
    data = shutil.copytree(corpus[0], tmp_path / "mt")
    shutil.copy(corpus[1] / "dict.txt", data)
    model = stock_models[1]
    if fits:
        shutil.copytree(data, tmp_path / "lm")
        for ending in ("idx", "bin"):
            shutil.copy(data / f"train.en-de.de.{ending}", tmp_path / "lm" / f"train.{ending}")
        shutil.copy(data / "dict.de.txt", tmp_path / "lm" / "dict.txt")
        shutil.copy(data / "dict.de.txt", data / "dict.txt")
        run("fairseq-train", tmp_path / "lm", *LANGUAGE, "--save-dir", tmp_path)
        model = tmp_path / "checkpoint_last.pt"
    output = run(
        "fairseq-generate", data, "--path", stock_models[0], "--cpu", "--num-workers", 0, "--batch-size", 12,
        "--max-len-b", 5, "--lm-path", model, "--lm-weight", 0.1, succeeds=fits,
    )  # fmt: skip
    if fits:
        assert "BLEU4" in output
    else:
        message = f"--lm-path {model}: its dictionary is not the target's, {data / 'dict.de.txt'}"
        assert output.splitlines()[-1].endswith(message) and "Traceback" not in output


@pytest.mark.parametrize("command", ["fairseq-generate", "fairseq-validate"])
def test_shards_that_would_be_passed_over_are_refused(
    command: str, corpus: tuple[Path, Path], stock_models: tuple[Path, Path]
) -> None:
    flags = ("--path", stock_models[0], "--cpu", "--batch-size", 4, "--num-shards", 2)
    output = run(command, corpus[0], *flags, succeeds=False)
    assert "--num-shards must be 1 here" in output.splitlines()[-1]
