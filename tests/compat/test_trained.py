"""What an evaluating command takes from the checkpoint."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from fairseq.checkpoint_utils import load_checkpoint_to_cpu

CPU = ("--cpu", "--num-workers", 0)


def score(data: Path, model: Path, *flags: object, succeeds: bool = True) -> str:
    return run("fairseq-eval-lm", data, "--path", model, *CPU, *flags, succeeds=succeeds)


def test_eval_lm_takes_what_the_checkpoint_knows(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path]
) -> None:
    output = score(corpus[1], stock_models[1])
    assert "as the checkpoint was trained: --tokens-per-sample 32" in output
    said = score(corpus[1], stock_models[1], "--tokens-per-sample", 32)
    assert "as the checkpoint" not in said
    tokens = sum(len(line.split()) + 1 for line in (corpus[1].parent / "test.en").read_text().splitlines())
    assert f"Evaluated {tokens} tokens" in output
    assert re.findall("Loss .*", output) == re.findall("Loss .*", said) != []
    assert "12 examples" in score(corpus[1], stock_models[1], "--sample-break-mode", "eos")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--context-window", 32),
            "--context-window must be at least 0 and below --tokens-per-sample (32), got 32",
        ),
        (("--max-target-positions", 64), "--max-target-positions must be the model's own, 32, got 64"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    flags: tuple[object, ...], message: str, corpus: tuple[Path, Path], stock_models: tuple[Path, Path]
) -> None:
    output = score(corpus[1], stock_models[1], *flags, succeeds=False)
    assert message in output.splitlines()[-1] and "Traceback" not in output


def test_eval_lm_of_a_translation_model_is_refused(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path]
) -> None:
    output = score(corpus[0], stock_models[0], succeeds=False)
    assert output.splitlines() == [
        "fairseq-eval-lm: error: fairseq-eval-lm scores language models; "
        f"{stock_models[0]} was trained with --task translation"
    ]


def test_validate_takes_the_task_of_the_checkpoint(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path]
) -> None:
    for data, model in zip(corpus, stock_models, strict=True):
        output = run("fairseq-validate", data, "--path", model, *CPU, "--batch-size", 4)
        assert "valid on 'valid' subset" in output
    output = run("fairseq-validate", corpus[0], "--path", stock_models[0], *CPU, succeeds=False)
    assert output.splitlines()[-1] == "fairseq-validate: error: --batch-size or --max-tokens must be given"
    output = run("fairseq-validate", corpus[0], *CPU, "--batch-size", 4, succeeds=False)
    assert "--path must name a checkpoint" in output.splitlines()[-1] and "Traceback" not in output


def test_generate_takes_the_direction_of_the_checkpoint(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of a model en-de, in a folder whose files say de-en."""
    for file in corpus[0].iterdir():
        shutil.copy(file, tmp_path / file.name.replace("en-de", "de-en"))
    output = run(
        "fairseq-generate", tmp_path, "--path", stock_models[0], *CPU, "--batch-size", 12, "--max-len-b", 5
    )
    assert "as the checkpoint was trained: --source-lang en, --target-lang de" in output
    assert re.search(r"^S-0\tw\d", output, re.M) and re.search(r"^T-0\tW\d", output, re.M)


def test_the_wrong_way_round_is_said(corpus: tuple[Path, Path], stock_models: tuple[Path, Path]) -> None:
    """A shared vocabulary hides it: BLEU is near 0, with exit status 0."""
    flags = (corpus[0], "--path", stock_models[0], *CPU, "--batch-size", 12, "--max-len-b", 5)
    warning = "the model was trained from en to de, not from de to en"
    assert warning in run("fairseq-generate", *flags, "-s", "de", "-t", "en")
    assert warning not in run("fairseq-generate", *flags, "-s", "en", "-t", "de")


@pytest.mark.parametrize("command", ["fairseq-generate", "fairseq-interactive"])
def test_a_model_of_another_task_is_refused(
    command: str, corpus: tuple[Path, Path], stock_models: tuple[Path, Path]
) -> None:
    """A language model in the translation task would score BLEU 0, with exit status 0."""
    for data, model, task in (
        (corpus[0], stock_models[1], "translation"),
        (corpus[1], stock_models[0], "language_modeling"),
    ):
        output = run(command, data, "--task", task, "--path", model, *CPU, succeeds=False)
        assert output.splitlines()[-1].endswith(f"and cannot do --task {task}") and "Traceback" not in output


OWN_TASK = """
from fairseq.tasks import FairseqTask, register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

@register_task("own", dataclass=LanguageModelingConfig)
class Own(FairseqTask):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.inner = LanguageModelingTask.setup_task(cfg)

    source_dictionary = property(lambda self: self.inner.source_dictionary)
    target_dictionary = property(lambda self: self.inner.target_dictionary)

    def load_dataset(self, split, **kwargs):
        self.inner.load_dataset(split)
        self.datasets = self.inner.datasets

    def build_generator(self, *args, **kwargs):
        return self.inner.build_generator(*args, **kwargs)

    def inference_step(self, *args, **kwargs):
        return self.inner.inference_step(*args, **kwargs)
"""


def test_a_task_of_a_users_own_may_do_anything_with_a_model(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "own_task").mkdir()
    (tmp_path / "own_task" / "__init__.py").write_text(OWN_TASK)
    flags = ("--user-dir", tmp_path / "own_task", "--task", "own", "--path", stock_models[1], *CPU)
    flags = (*flags, "--tokens-per-sample", 32, "--batch-size", 4, "--beam", 1, "--max-len-b", 5)
    output = run("fairseq-generate", corpus[1], *flags)
    assert len(re.findall(r"^H-\d+", output, re.M)) == 3


def test_a_task_that_is_not_used_need_not_be_known(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """A translation model trained in a task of its own translates in fairseq's, which the user names."""
    state = load_checkpoint_to_cpu(str(stock_models[0]))
    state["cfg"]["task"]["_name"] = "of_a_user"
    torch.save(state, tmp_path / "model.pt")
    flags = ("--path", tmp_path / "model.pt", *CPU, "--batch-size", 12, "--max-len-b", 5)
    assert "BLEU4" in run("fairseq-generate", corpus[0], *flags)


def test_a_language_model_goes_on_with_text(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path]
) -> None:
    flags = ("--task", "language_modeling", "--path", stock_models[1], *CPU, "--batch-size", 4, "--beam", 1)
    output = run("fairseq-generate", corpus[1], *flags, "--prefix-size", 1, "--max-len-b", 5)
    assert len(re.findall(r"^H-\d+", output, re.M)) == 3  # blocks of 32 tokens
