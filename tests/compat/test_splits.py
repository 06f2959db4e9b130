"""The sets of a data folder: missing, empty, joined, of sentences that do not fit."""

import re
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import fairseq.tasks
import numpy as np
import pytest
from commands import run
from fairseq.data import ListDataset, data_utils, iterators
from fairseq.data.indexed_dataset import make_builder
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask, load_langpair_dataset
from omegaconf import OmegaConf
from stock import LANGUAGE, TRANSLATION

from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.splits import load_with_targets, read_the_sets_that_are_asked_for

CPU = ("--cpu", "--num-workers", 0)


def translation(data: Path) -> TranslationTask:
    cfg = TranslationConfig(data=str(data), source_lang="en", target_lang="de", dataset_impl="mmap")
    cfg.train_subset, cfg.required_seq_len_multiple = "train", 1
    return TranslationTask.setup_task(cfg)


def language(data: Path) -> LanguageModelingTask:
    cfg = LanguageModelingConfig(data=str(data), tokens_per_sample=32, dataset_impl="mmap", seed=1)
    cfg.use_plasma_view = False
    return LanguageModelingTask.setup_task(cfg)


def empty(prefix: Path) -> None:
    make_builder(f"{prefix}.bin", "mmap", vocab_size=100).finalize(f"{prefix}.idx")


def test_a_missing_set_is_named(corpus: tuple[Path, Path]) -> None:
    for task, pair, folder in (
        (translation(corpus[0]), " of en-de", corpus[0]),
        (language(corpus[1]), "", corpus[1]),
    ):
        with pytest.raises(
            UserError, match=f"no set 'tset'{pair} in {folder}; sets there: test, train, valid"
        ):
            task.load_dataset("tset")


def test_an_empty_set_is_named(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(corpus[1], tmp_path / "lm")
    empty(tmp_path / "lm" / "valid")
    with pytest.raises(UserError, match=f"{tmp_path / 'lm' / 'valid'} holds no sentence; name another set"):
        language(tmp_path / "lm").load_dataset("valid")


def test_sets_are_joined(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    data = shutil.copytree(corpus[0], tmp_path / "mt")
    for ending in ("en.idx", "en.bin", "de.idx", "de.bin"):
        shutil.copy(data / f"test.en-de.{ending}", data / f"valid1.en-de.{ending}")
    task = translation(data)
    task.load_dataset("valid", combine=True)
    assert len(task.dataset("valid")) == 24
    (data / "valid1.en-de.de.idx").unlink()
    with pytest.raises(UserError, match="valid1.en-de.de.idx is missing"):
        task.load_dataset("valid", combine=True)


def test_pairs_are_loaded_by_name_and_by_position(corpus: tuple[Path, Path]) -> None:
    task = translation(corpus[0])
    task.load_dataset("valid")
    sides = ("en", task.src_dict, "de", task.tgt_dict)
    given = (str(corpus[0]), "valid", *sides, True, "mmap", -1, True, False, 99, 99)
    assert len(load_langpair_dataset(*given)) == len(task.dataset("valid"))
    with pytest.raises(TypeError, match="max_target_positions"):
        load_langpair_dataset(*given[:-1])


def test_sides_of_unequal_length_are_named(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    data = shutil.copytree(corpus[0], tmp_path / "mt")
    for ending in ("idx", "bin"):
        shutil.copy(data / f"train.en-de.de.{ending}", data / f"valid.en-de.de.{ending}")
    with pytest.raises(UserError, match=f"'valid' in {data}: source and target must have as many lines"):
        translation(data).load_dataset("valid")


def test_a_set_without_targets_is_no_validation_set(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """But it can be translated."""
    data = shutil.copytree(corpus[0], tmp_path / "mt")
    for ending in ("idx", "bin"):
        (data / f"valid.en-de.de.{ending}").unlink()
    task = translation(data)
    task.load_dataset("valid")
    with pytest.raises(UserError, match=re.escape(f"the set 'valid' in {data} has no target side (de)")):
        load_with_targets(task, task.load_dataset, "valid")


def test_training_reads_the_sets_that_are_asked_for(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """None with --disable-validation; one joined with --combine-valid-subsets."""
    data = shutil.copytree(corpus[1], tmp_path / "lm")
    empty(data / "valid")
    save = ("--save-dir", tmp_path / "saved", "--max-update", 1)
    validating = tuple(flag for flag in LANGUAGE if flag != "--disable-validation")
    output = run("fairseq-train", data, *validating, *save, succeeds=False)
    assert f"{data / 'valid'} holds no sentence" in output.splitlines()[-1] and "Traceback" not in output
    run("fairseq-train", data, *LANGUAGE, *save)
    joined = shutil.copytree(corpus[0], tmp_path / "mt")
    for ending in ("en.idx", "en.bin", "de.idx", "de.bin"):
        shutil.copy(joined / f"test.en-de.{ending}", joined / f"valid1.en-de.{ending}")
    validating = tuple(flag for flag in TRANSLATION if flag != "--disable-validation")
    sets = ("--valid-subset", "valid,valid1")
    save = ("--save-dir", tmp_path / "translation", "--max-update", 1)
    output = run("fairseq-train", joined, *validating, *save, *sets, "--combine-valid-subsets")
    assert "'valid' subset" in output and "'valid1' subset" not in output


@pytest.mark.parametrize(("named", "refused"), [("valid", True), ("valid,valid1", False)])
def test_validation_sets_of_pairs_are_known_by_their_names(named: str, refused: bool, tmp_path: Path) -> None:
    for name in ("valid.en-de.en.idx", "valid1.en-de.en.idx", "valid1.en-de.de.bin"):
        (tmp_path / name).touch()
    dataset = SimpleNamespace(
        ignore_unused_valid_subsets=False, combine_valid_subsets=False, disable_validation=False,
        valid_subset=named,
    )  # fmt: skip
    cfg = SimpleNamespace(dataset=dataset, task=SimpleNamespace(data=str(tmp_path)))
    if refused:
        with pytest.raises(ValueError, match=r"\['valid1'\] will be ignored"):
            data_utils.raise_if_valid_subsets_unintentionally_ignored(cfg)
    else:
        data_utils.raise_if_valid_subsets_unintentionally_ignored(cfg)


@pytest.mark.parametrize("vector", [True, False])
def test_max_tokens_below_the_longest_sentence(vector: bool) -> None:
    sizes = np.array([3, 9, 4])
    arguments = (np.arange(3), lambda i: int(sizes[i]), sizes if vector else None)
    message = "--max-tokens must be at least the longest sentence or block, 9 tokens, got 8"
    with pytest.raises(FlagError, match=message):
        data_utils.batch_by_size(*arguments, max_tokens=8)
    assert len(data_utils.batch_by_size(*arguments, max_tokens=9)) == 3


def test_sentences_that_are_too_long(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Refused in one line; with --skip-invalid-size-inputs-valid-test what the score leaves out is said."""
    command = (
        "fairseq-validate", corpus[0], "--path", stock_models[0], *CPU, "--batch-size", 4, "--valid-subset",
        "test", "--max-source-positions",
    )  # fmt: skip
    output = run(*command, 5, succeeds=False)
    assert "Traceback" not in output and "max_positions=(5, 1024)" in output.splitlines()[-1]
    lengths = [len(line.split()) + 1 for line in (corpus[0].parent / "test.en").read_text().splitlines()]
    skip = "--skip-invalid-size-inputs-valid-test"
    output = run(*command, 5, skip)
    left_out = sum(length > 5 for length in lengths)
    assert f"{left_out} of 12 sentences or blocks are longer than the model takes" in output
    assert "there is nothing to evaluate" in run(*command, 1, skip, succeeds=False).splitlines()[-1]


def test_no_sentence_fits() -> None:
    nothing = iterators.EpochBatchIterator(ListDataset([[4, 2]]), list, batch_sampler=lambda *_: [])
    with pytest.raises(UserError, match="all 1 sentences of a set are longer than the model or --max-tokens"):
        _ = nothing.first_batch


def test_a_namespace_of_flags_is_a_configuration_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts call the command's main, and fairseq's own tests."""
    converted = OmegaConf.create({"dataset": {"combine_valid_subsets": True, "valid_subset": "test"}})
    monkeypatch.setattr("fairseq.dataclass.utils.convert_namespace_to_omegaconf", lambda _: converted)
    module = SimpleNamespace(main=lambda cfg: cfg, tasks=fairseq.tasks)
    read_the_sets_that_are_asked_for(module)
    assert module.main(Namespace()).dataset.valid_subset == "valid"
