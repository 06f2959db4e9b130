"""fairseq's own commands with fairseq's own models, end to end: what the patches are for."""

import os
import re
from pathlib import Path

import pytest
import torch
from commands import run, run_anew, run_as_torchrun
from fairseq.checkpoint_utils import load_checkpoint_to_cpu

TINY = (
    "--cpu", "--optimizer", "adam", "--lr", "0.01", "--max-tokens", "200", "--no-epoch-checkpoints",
    "--log-format", "simple", "--log-interval", "1", "--num-workers", "0", "--seed", "3",
    "--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "32",
    "--decoder-attention-heads", "2",
)  # fmt: skip
TRANSFORMER = (
    *TINY, "--arch", "transformer", "--criterion", "label_smoothed_cross_entropy", "--encoder-layers", "1",
    "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "32", "--encoder-attention-heads", "2",
)  # fmt: skip
LANGUAGE_MODEL = (
    *TINY,
    "--task",
    "language_modeling",
    "--arch",
    "transformer_lm",
    "--tokens-per-sample",
    "32",
)


def updates(checkpoint: Path) -> int:
    return load_checkpoint_to_cpu(str(checkpoint))["optimizer_history"][-1]["num_updates"]


@pytest.fixture(scope="module")
def checkpoint(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fairseq's transformer after four updates."""
    folder = tmp_path_factory.mktemp("translation")
    output = run_anew(
        "fairseq-train", corpus[0], *TRANSFORMER, "--max-update", 4, "--bf16", "--save-dir", folder
    )
    assert "Warning" not in output, output
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def hypotheses(corpus: tuple[Path, Path], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test set as fairseq-generate translates it, with its references beside it."""
    output = run(
        "fairseq-generate", corpus[0], "--path", checkpoint, "--cpu", "--beam", 2, "--batch-size", 12,
        "--max-len-b", 10,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("scored")
    found = sorted(re.findall(r"^H-(\d+)\t\S+\t(.*)$", output, flags=re.M))
    references = sorted(re.findall(r"^T-(\d+)\t(.*)$", output, flags=re.M))
    assert len(found) == len(references) == 12
    assert not re.search(r"^H(?!-\d+\t)", output, flags=re.M), "only hypotheses may begin with H"
    (folder / "hypotheses").write_text("".join(f"{text}\n" for _, text in found))
    (folder / "references").write_text("".join(f"{text}\n" for _, text in references))
    return folder


def test_train_resumes(corpus: tuple[Path, Path], checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--max-update", 5, "--save-dir", tmp_path, "--restore-file", checkpoint, "--bf16")
    output = run("fairseq-train", corpus[0], *TRANSFORMER, *arguments)
    assert f"Loaded checkpoint {checkpoint} (epoch 1 @ 4 updates)" in output
    last = tmp_path / "checkpoint_last.pt"
    assert updates(last) == 5
    written = last.read_bytes()
    output = run("fairseq-train", corpus[0], *TRANSFORMER, *arguments[:4], "--bf16")
    assert "nothing left to train: all --max-update 5 updates were made before" in output
    assert last.read_bytes() == written


def test_validate(corpus: tuple[Path, Path], checkpoint: Path) -> None:
    arguments = ("--task", "translation", "--path", checkpoint, "--cpu", "--batch-size", 4)
    assert re.search(
        r"valid on 'valid' subset \| loss [\d.]+", run("fairseq-validate", corpus[0], *arguments)
    )


def test_interactive(corpus: tuple[Path, Path], checkpoint: Path) -> None:
    arguments = ("--path", checkpoint, "--cpu", "--beam", 2, "--max-len-b", 10)
    output = run("fairseq-interactive", corpus[0], *arguments, stdin="w1 w2\nw3\n")
    assert re.findall(r"^H-(\d+)\t", output, flags=re.M) == ["0", "1"]


@pytest.mark.parametrize(
    ("option", "printed"),
    [
        (None, r"^BLEU4 = 100\.00"),
        ("--sacrebleu", r"^BLEU = 100\.00"),
        ("--sentence-bleu", r"^11 BLEU4 = \d"),
    ],
)
def test_score(hypotheses: Path, option: str | None, printed: str) -> None:
    references = hypotheses / "references"
    options = () if option is None else (option,)
    assert re.search(printed, run("fairseq-score", "-s", references, "-r", references, *options), flags=re.M)


@pytest.mark.parametrize("option", [(), ("--sacrebleu",), ("--sentence-bleu",)])
def test_score_refuses_files_of_unequal_length(
    hypotheses: Path, option: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("w1\n")
    files = (tmp_path / "short", hypotheses / "references")
    for given, message in ((files, "--sys ends after line 1, --ref does not"), (files[::-1], "--ref ends")):
        output = run("fairseq-score", "-s", given[0], "-r", given[1], *option, succeeds=False)
        assert message in output.splitlines()[-1] and "Traceback" not in output


@pytest.mark.parametrize("option", [(), ("--sacrebleu",), ("--sentence-bleu",)])
def test_score_refuses_missing_and_empty_files(option: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("sys", "ref"):
        (tmp_path / name).touch()
    files = ("-s", tmp_path / "sys", "-r", tmp_path / "ref")
    for problem in ("are empty: there is nothing to score", "sys does not exist"):
        output = run("fairseq-score", *files, *option, succeeds=False)
        assert output.splitlines()[-1].endswith(problem) and "Traceback" not in output
        (tmp_path / "sys").unlink(missing_ok=True)


def test_train_language_model_and_eval_lm(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    run("fairseq-train", corpus[1], *LANGUAGE_MODEL, "--max-update", 2, "--save-dir", tmp_path)
    arguments = ("--path", tmp_path / "checkpoint_last.pt", "--cpu", "--tokens-per-sample", 32)
    output = run("fairseq-eval-lm", corpus[1], *arguments, "--batch-size", 4)
    assert re.search(r"Perplexity: [\d.]+", output)
    assert "Warning" not in output


def test_hydra_train(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {
        "task": "language_modeling", "task.data": corpus[1], "task.tokens_per_sample": 32,
        "model": "transformer_lm", "model.decoder_layers": 1, "model.decoder_embed_dim": 32,
        "model.decoder_ffn_embed_dim": 32, "model.decoder_attention_heads": 2,
        "criterion": "cross_entropy", "optimizer": "adam", "optimization.lr": "[0.01]",
        "optimization.max_update": 2, "dataset.batch_size": 4, "dataset.num_workers": 0, "common.cpu": "true",
        "checkpoint.save_dir": tmp_path / "saved", "hydra.run.dir": tmp_path / "hydra",
    }  # fmt: skip
    run("fairseq-hydra-train", *(f"{key}={value}" for key, value in settings.items()))
    assert (tmp_path / "saved" / "checkpoint_last.pt").exists()


def test_two_processes_train_and_resume(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    train = (corpus[0], *TRANSFORMER, "--distributed-backend", "gloo", "--save-dir", tmp_path)
    run_as_torchrun(2, "fairseq-train", *train, "--max-update", 3, "--ddp-backend", "pytorch_ddp")
    output = run_as_torchrun(2, "fairseq-train", *train, "--max-update", 5, "--ddp-backend", "legacy_ddp")
    assert "training on 2 devices" in output
    assert re.search(r"Loaded checkpoint .* @ 3 updates\)", output)
    assert updates(tmp_path / "checkpoint_last.pt") == 5


class MakesFolder:
    """Unpickled without a guard, this runs code of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_refused_checkpoint_ends_a_command_with_one_line(
    corpus: tuple[Path, Path], checkpoint: Path, tmp_path: Path
) -> None:
    state = load_checkpoint_to_cpu(str(checkpoint))
    state["extra_state"]["payload"] = MakesFolder(tmp_path / "made")
    torch.save(state, tmp_path / "unsafe.pt")
    output = run(
        "fairseq-interactive", corpus[0], "--path", tmp_path / "unsafe.pt", "--cpu",
        succeeds=False, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1",
    )  # fmt: skip
    lines = [line for line in output.splitlines() if "| INFO |" not in line]
    assert len(lines) == 1 and lines[0].startswith(
        f"fairseq-interactive: error: cannot load checkpoint {tmp_path / 'unsafe.pt'}: it holds"
    )
    assert not (tmp_path / "made").exists()
