"""--moe-balance, from the command line to a checkpoint and back."""

from pathlib import Path

import pytest
import torch
from commands import TINY_LM, TRAIN, logged, run
from fairseq import checkpoint_utils
from toy import language_model

from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.moe.balance import BALANCES

U = 0.02
BIAS = ("--moe-router", "topk", "--moe-topk", 2, "--moe-balance-step", U, "--moe-balance", "bias")


@pytest.fixture(scope="module")
def trained(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Four updates by a bias, with a criterion that knows no balance; and what was printed."""
    folder = tmp_path_factory.mktemp("balance")
    flags = (corpus[1], *TINY_LM, *TRAIN, *BIAS, "--criterion", "cross_entropy", "--max-update", 4)
    output = run("fairseq-train", *flags, "--save-dir", folder)
    return folder / "checkpoint_last.pt", output


def test_a_bias_is_trained_without_a_loss(trained: tuple[Path, str]) -> None:
    path, output = trained
    assert len(logged(output, "train_inner")) == 4
    assert "load-balance loss" not in output  # nothing is missing
    state = torch.load(path, weights_only=True)["model"]
    (bias_E,) = (value for name, value in state.items() if name.endswith(".balancing.bias_E"))
    assert bias_E.dtype == torch.float32 and U < bias_E.abs().max() <= 4 * 2 * U
    assert abs(bias_E.mean()) < 1e-6


def test_a_checkpoint_opens_with_its_bias_and_not_without(trained: tuple[Path, str]) -> None:
    path = str(trained[0])
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path])
    (layer,) = moe_layers(model)
    assert layer.router.balancing.bias_E.count_nonzero()
    with pytest.raises(RuntimeError, match="balancing.bias_E") as error:
        without = {"moe_balance": "none", "moe_balance_step": 0.001}
        checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=without)
    assert "\n" not in str(error.value)


def test_resuming_with_another_balance_says_which_flag_is_missing(
    trained: tuple[Path, str], corpus: tuple[Path, Path]
) -> None:
    flags = (corpus[1], *TINY_LM, *TRAIN, "--max-update", 5, "--save-dir", trained[0].parent)
    said = run("fairseq-train", *flags, *BIAS[:4], succeeds=False).strip().splitlines()[-1]
    assert "--moe-balance bias" in said and f"--moe-balance-step {U}" in said


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("router", ["threshold", "topk"])
def test_the_flag_reaches_every_layer(router: str, balance: str) -> None:
    layers = moe_layers(language_model(moe_router=router, moe_balance=balance))
    kinds = {type(layer.router.balancing).__name__ for layer in layers}
    expected = ("NoneType", "AllChoices", "GlobalShare", "LossFreeBias", "Balance")
    assert kinds == {expected[BALANCES.index(balance)]}


def test_the_step_reaches_every_layer() -> None:
    layers = moe_layers(language_model(moe_router="topk", moe_balance="bias", moe_balance_step=U))
    assert {layer.router.balancing.step_size for layer in layers} == {U}
