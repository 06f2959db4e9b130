"""--moe-router relu, from the command line to a checkpoint and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY_LM, TRAIN, logged, run
from fairseq import checkpoint_utils
from parallel_runs import LM, UNUSED, train
from tolerances import about, printed
from toy import language_model, language_sample, sentences, task

from xmoe_fairseq.criterions import MoECrossEntropyCriterion
from xmoe_fairseq.moe import moe_layers, record_routing

RELU = ("--moe-router", "relu", "--moe-topk", 1, "--update-freq", 2, "--max-update", 6)


def weights(checkpoint: Path) -> dict[str, Any]:
    state = torch.load(checkpoint, weights_only=True)["model"]
    return {name: value for name, value in state.items() if not UNUSED.search(name)}


@pytest.fixture(scope="module")
def trained(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Checkpoints after 4 and 6 updates, and what was logged."""
    folder = tmp_path_factory.mktemp("relu")
    flags = (corpus[1], *TINY_LM, *TRAIN, *RELU, "--save-interval-updates", 4, "--save-dir", folder)
    return folder, logged(run("fairseq-train", *flags), "train_inner")


def test_lambda_is_logged_and_saved(trained: tuple[Path, list[dict]]) -> None:
    folder, records = trained
    used = [record["moe_decoder_l1_coeff"] for record in records]
    assert used == [pytest.approx(1e-8 * 1.2**update, rel=1e-3) for update in range(6)]  # more than one each
    assert records[0]["moe_decoder_experts_per_token"] > 2  # of 8
    saved = {name: value for name, value in weights(folder / "checkpoint_last.pt").items() if "l1" in name}
    assert len(saved) == 1 and all(value.item() == about(1e-8 * 1.2**6) for value in saved.values())


def test_resuming_goes_on_bit_for_bit(
    trained: tuple[Path, list[dict]], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    (middle,) = trained[0].glob("checkpoint_*_4.pt")
    train(1, corpus[1], *LM, *TRAIN, *RELU, "--save-dir", tmp_path, "--restore-file", middle)
    again, expected = (weights(folder / "checkpoint_last.pt") for folder in (tmp_path, trained[0]))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_checkpoint_opens_with_its_lambda(trained: tuple[Path, list[dict]]) -> None:
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(trained[0] / "checkpoint_last.pt")])
    (layer,) = moe_layers(model)
    assert layer.router.sparsity.target == 1 and layer.router.sparsity.l1_coeff.item() == about(1e-8 * 1.2**6)


@pytest.mark.parametrize("coeff", [0.0, 0.01])
def test_the_criterion_weighs_its_loss_by_lambda_alone(coeff: float) -> None:
    model, batch = language_model(moe_router="relu"), language_sample(sentences([9, 7]))
    (layer,) = moe_layers(model)
    layer.router.sparsity.l1_coeff.fill_(0.5)
    with record_routing(model) as records:
        loss, size, logged = MoECrossEntropyCriterion(task(), False).weigh(coeff, 0.0)(model, batch)
    expected = size * records[0][1].load_balance_loss.item()
    assert expected > 1 and (loss - logged["loss"]).item() == printed(expected, 4)
