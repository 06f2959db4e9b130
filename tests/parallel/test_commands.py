"""The commands as a user types them: several ranks train, one process or several generate."""

import re
from pathlib import Path

import pytest
from commands import PLUGIN, TINY_LM, TINY_MT, TRAIN, logged, run, run_as_torchrun

CPU = ("--distributed-backend", "gloo")


def hypotheses(output: str) -> dict[int, tuple[str, str]]:
    found = re.findall(r"^(?:\[\S+\]:)?H-(\d+)\t(\S+)\t(.*)$", output, re.M)
    return {int(number): (score, text) for number, score, text in found}


def test_translation_from_sharded_experts(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """Two ranks train; one process, then two, generate and validate with no flag about experts or shards.

    3 batches for 2 ranks: the one that has finished must not keep the other from going on.
    """
    output = run_as_torchrun(
        2, "fairseq-train", corpus[0], *TINY_MT, *TRAIN, *CPU, "--max-update", 6,
        "--moe-expert-parallel-size", 2, "--moe-sharded-checkpoints", "--save-dir", tmp_path,
    )  # fmt: skip
    assert logged(output, "train")[-1]["train_moe_encoder_experts_per_token"] >= 1
    assert len(list((tmp_path / "experts").glob("*.pt"))) == 2
    generate = (
        corpus[0], *PLUGIN, "--cpu", "--num-workers", 0, "--source-lang", "en", "--target-lang", "de",
        "--batch-size", 4, "--required-batch-size-multiple", 1, "--path", tmp_path / "checkpoint_last.pt",
        "--max-len-b", 10,
    )  # fmt: skip
    one = hypotheses(run("fairseq-generate", *generate))
    assert len(one) == 12
    assert hypotheses(run_as_torchrun(2, "fairseq-generate", *generate, *CPU)) == one
    validate = (*generate[:-2], "--task", "translation", "--valid-subset", "test", "--log-format", "json")
    (expected,) = logged(run("fairseq-validate", *validate), "test")
    found = logged(run_as_torchrun(2, "fairseq-validate", *validate, *CPU), "test")
    assert found == [expected]


def test_scoring_holds_all_experts_whoever_trained(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """--moe-expert-parallel-size -1 of a run on one process must not share them out among scoring ranks,
    whose numbers of batches differ."""
    run(
        "fairseq-train", corpus[1], *TINY_LM, *TRAIN, "--max-update", 2, "--moe-expert-parallel-size", -1,
        "--disable-validation", "--save-dir", tmp_path,
    )  # fmt: skip
    score = (
        "fairseq-eval-lm", corpus[1], *PLUGIN, "--cpu", "--path", tmp_path / "checkpoint_last.pt",
        "--tokens-per-sample", 32, "--batch-size", 1, "--required-batch-size-multiple", 1, "--num-workers", 0,
    )  # fmt: skip
    one, two = run(*score), run_as_torchrun(2, *score, *CPU)
    assert re.findall("Loss .*", two) == re.findall("Loss .*", one) != []


def test_a_language_model_from_gathered_experts(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    run_as_torchrun(
        2, "fairseq-train", corpus[1], *TINY_LM, *TRAIN, *CPU, "--max-update", 4,
        "--moe-expert-parallel-size", -1, "--disable-validation", "--save-dir", tmp_path,
    )  # fmt: skip
    output = run(
        "fairseq-eval-lm", corpus[1], *PLUGIN, "--cpu", "--path", tmp_path / "checkpoint_last.pt",
        "--tokens-per-sample", 32, "--batch-size", 4,
    )  # fmt: skip
    perplexity = float(re.findall(r"Perplexity: ([\d.]+)", output)[-1])
    assert perplexity == pytest.approx(37, rel=0.5)  # hardly trained: about the size of the vocabulary
