"""Cheap and shared experts, from the command line to a checkpoint and back."""

from pathlib import Path

import pytest
import torch
from commands import PLUGIN, TINY_MT, TRAIN, logged, run
from fairseq import checkpoint_utils
from parallel_runs import UNUSED

from xmoe_fairseq.moe import moe_layers

FLAGS = (
    "--moe-zero-experts", 1, "--moe-copy-experts", 1, "--moe-constant-experts", 2,
    "--moe-cheap-balance", 0.75, "--moe-shared-experts", 1, "--moe-target-experts-per-token", 2.5,
    "--dropout", 0,
)  # fmt: skip


def train(corpus: tuple[Path, Path], folder: Path, updates: int) -> str:
    flags = (*TINY_MT, *TRAIN, *FLAGS, "--max-update", updates, "--save-dir", folder)
    return run("fairseq-train", corpus[0], *flags)


@pytest.fixture(scope="module")
def trained(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Four updates, and what was printed."""
    folder = tmp_path_factory.mktemp("cheap")
    return folder / "checkpoint_last.pt", train(corpus, folder, 4)


def test_what_is_logged(trained: tuple[Path, str]) -> None:
    values = logged(trained[1], "train")[-1]
    for side in ("encoder", "decoder"):
        experts, cheap = (
            float(values[f"train_moe_{side}_{name}"]) for name in ("experts_per_token", "cheap_per_token")
        )
        assert 1 < experts < 3 and 0 < cheap < 2
        router = 2 * 32 * 12 / (4 * 32 * 32)  # of its FLOPs over the dense FFN's
        assert float(values[f"train_moe_{side}_flops_vs_dense_ffn"]) == pytest.approx(
            experts / 2 + router, abs=2e-3
        )


def test_resumed_it_is_the_same(trained: tuple[Path, str], corpus: tuple[Path, Path], tmp_path: Path) -> None:
    train(corpus, tmp_path, 2)
    train(corpus, tmp_path, 4)
    once, twice = (
        torch.load(path, weights_only=True)["model"] for path in (trained[0], tmp_path / "checkpoint_last.pt")
    )
    names = [name for name in once if not UNUSED.search(name)]
    assert sum(".moe.cheap." in name or ".moe.shared." in name for name in names) == 6 * 2
    assert not [name for name in names if not torch.equal(once[name], twice[name])]


def test_the_stock_commands_open_it(trained: tuple[Path, str], corpus: tuple[Path, Path]) -> None:
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(trained[0])])
    for layer in moe_layers(model):
        assert layer.cheap.numbers == (1, 1, 2) and layer.router.cheap_balance == 0.75
        assert layer.router.num_experts == 8 + 4 and layer.router.budget.target == 1.5
    flags = ("-s", "en", "-t", "de", "--beam", 2, "--cpu", "--path", trained[0], "--gen-subset", "valid")
    assert "Generate valid" in run("fairseq-generate", corpus[0], *PLUGIN, *flags)
    info = run("xmoe-checkpoint", "info", trained[0])
    assert "activated parameters per token: about " in info and "shared + 1.5 x " in info


def test_a_checkpoint_without_them_says_so(trained: tuple[Path, str]) -> None:
    overrides = {"moe_copy_experts": 0}
    with pytest.raises(RuntimeError, match="router.weight") as error:
        checkpoint_utils.load_model_ensemble_and_task([str(trained[0])], arg_overrides=overrides)
    assert "\n" not in str(error.value)
