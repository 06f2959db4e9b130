"""--moe-target-experts-per-token, --moe-layer-thresholds and the flags of routers, from the command line to a
checkpoint and back."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY_LM, TRAIN, logged, run
from fairseq import checkpoint_utils
from parallel_runs import LM, train
from tolerances import assert_same, printed
from toy import language_model, sentences, translation_model

from xmoe_fairseq.moe import ThresholdRouter, moe_layers
from xmoe_fairseq.trainer import MoETrainer

BUDGET = ("--moe-target-experts-per-token", 1.5)
RULES = ["mass", "probability", "relative"]


def routers(model: Any) -> list[ThresholdRouter]:
    return [layer.router for layer in moe_layers(model)]


def steered(checkpoint: Path) -> dict[str, float]:
    state = torch.load(checkpoint, weights_only=True)["model"]
    return {name: float(value) for name, value in state.items() if ".budget." in name}


def load(checkpoint: Path, **overrides: Any) -> Any:
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides=overrides)
    return models[0].eval()


@pytest.fixture(scope="module")
def trained_by(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a rule: checkpoints after 4 and 6 updates, and what was logged."""

    @cache
    def train_by(rule: str) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp("budget")
        flags = (corpus[1], *TINY_LM, *TRAIN, *BUDGET, "--update-freq", 2, "--max-update", 6)
        flags = (*flags, "--moe-threshold-rule", rule)
        output = run("fairseq-train", *flags, "--save-interval-updates", 4, "--save-dir", folder)
        return folder, logged(output, "train_inner") + logged(output, "valid")[-1:]

    return train_by


@pytest.fixture
def trained(trained_by: Any) -> tuple[Path, list[dict]]:
    return trained_by("mass")


@pytest.mark.parametrize("rule, start", [*zip(RULES, (1 / 8, 1 / 1.5, 0.0), strict=True)])
def test_the_budget_holds_from_the_first_update_on(rule: str, start: float, trained_by: Any) -> None:
    folder, records = trained_by(rule)
    train, valid = records[:-1], records[-1]
    taken = [record["moe_decoder_experts_per_token"] for record in train]
    assert len(taken) == 6 and taken[0] <= 1.5
    assert sum(taken) / 6 == pytest.approx(1.5, abs=0.15)
    used = [record["moe_decoder_threshold"] for record in train]
    assert used[0] == printed(start, 4) and used[1] != used[0]
    assert valid["valid_moe_decoder_experts_per_token"] == pytest.approx(1.5, abs=0.3)
    saved = steered(folder / "checkpoint_last.pt")
    assert valid["valid_moe_decoder_threshold"] == printed(sum(saved.values()) / len(saved), 4)


@pytest.mark.parametrize("rule", RULES)
def test_resuming_follows_the_same_thresholds(
    rule: str, trained_by: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = trained_by(rule)[0]
    (middle,) = folder.glob("checkpoint_*_4.pt")
    flags = (corpus[1], *LM, *TRAIN, *BUDGET, "--update-freq", 2, "--max-update", 6)
    train(1, *flags, "--moe-threshold-rule", rule, "--save-dir", tmp_path, "--restore-file", middle)
    expected = steered(folder / "checkpoint_last.pt")
    assert expected and steered(tmp_path / "checkpoint_last.pt") == expected
    assert steered(middle) != expected


def test_a_checkpoint_trained_with_one_rule_is_tested_with_another(trained: tuple[Path, list[dict]]) -> None:
    own = {"moe_target_experts_per_token": 0}
    for rule, t in (("probability", 0.08), ("relative", 0.5)):
        (router,) = routers(
            load(trained[0] / "checkpoint_last.pt", moe_threshold_rule=rule, moe_threshold=t, **own)
        )
        assert (router.rule.name, router.threshold_in_use) == (rule, t)


def test_a_checkpoint_of_before_there_were_rules_is_of_mass(
    trained: tuple[Path, list[dict]], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    state = torch.load(trained[0] / "checkpoint_last.pt", weights_only=True)
    del state["cfg"]["model"]["moe_threshold_rule"]
    state["cfg"]["model"]["moe_threshold"] = 0.9  # which was there, too, and counted for nothing
    path = tmp_path / "old.pt"
    torch.save(state, path)
    (router,) = routers(load(path))
    assert router.rule.name == "mass" and [float(router.threshold_in_use)] == [*steered(path).values()]
    own = {"moe_target_experts_per_token": 0, "moe_threshold_rule": "probability", "moe_threshold": 0.08}
    (router,) = routers(load(path, **own))
    assert (router.rule.name, router.threshold_in_use) == ("probability", 0.08)
    flags = (
        corpus[1],
        *LM,
        *TRAIN,
        *BUDGET,
        "--moe-threshold-rule",
        "mass",
        "--max-update",
        13,
        "--save-dir",
        tmp_path,
        "--restore-file",
        path,
    )
    train(1, *flags)
    assert steered(tmp_path / "checkpoint_last.pt").keys() == steered(path).keys()


def test_a_checkpoint_can_be_opened_with_other_thresholds(trained: tuple[Path, list[dict]]) -> None:
    path = trained[0] / "checkpoint_last.pt"
    as_trained = [float(router.threshold_in_use) for router in routers(load(path))]
    assert as_trained == list(steered(path).values())
    fixed = routers(load(path, moe_target_experts_per_token=0, moe_threshold=0.5))
    assert [router.threshold_in_use for router in fixed] == [0.5]
    own = load(path, moe_target_experts_per_token=0, moe_layer_thresholds="0.25")
    assert [router.threshold_in_use for router in routers(own)] == [0.25]
    topk = routers(load(path, moe_router="topk", moe_topk=2))
    assert [router.k for router in topk] == [2]
    half = load(path).half()
    assert [float(router.threshold_in_use) for router in routers(half)] == as_trained


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"moe_threshold": 0.5}, "moe_threshold counts for nothing in a model trained with a budget; add"),
        ({"moe_target_experts_per_token": 2}, "moe_target_experts_per_token must be 0 .*, got 2"),
        (
            {"moe_target_experts_per_token": 0, "moe_threshold_rule": "relative"},
            "moe_threshold_rule must come with its own moe_threshold or moe_layer_thresholds, got relative",
        ),
        (
            {"moe_target_experts_per_token": 0, "moe_layer_thresholds": "0.5", "moe_threshold": 0.1},
            "moe_threshold counts for nothing in a model with a t for each layer; add "
            "'moe_layer_thresholds': ''; its rule is mass, got 0.1",
        ),
    ],
)
def test_thresholds_that_would_be_passed_over_are_refused(
    overrides: dict[str, float], message: str, trained: tuple[Path, list[dict]]
) -> None:
    with pytest.raises(ValueError, match=f"--model-overrides: {message}"):
        load(trained[0] / "checkpoint_last.pt", **overrides)


def test_a_model_names_its_trainer() -> None:
    assert language_model().trainer_class is MoETrainer
    assert not hasattr(language_model(moe_freq=0), "trainer_class")


def test_temperature_divides_the_scores_and_the_initial_scale_multiplies_the_weight() -> None:
    def built(**flags: Any) -> Any:
        torch.manual_seed(2)
        return language_model(**flags)

    plain, cool, scaled = built(), built(moe_router_temperature=0.5), built(moe_router_init_scale=2.0)
    weights = [routers(model)[0].weight for model in (plain, cool, scaled)]
    assert torch.equal(weights[1], weights[0]) and torch.equal(weights[2], 2 * weights[0])
    x_TD = torch.randn(6, 32)
    scores = [routers(model)[0].score(x_TD) for model in (plain, cool, scaled)]
    assert_same(scores[1:], [2 * scores[0]] * 2)
    tokens = sentences([5, 7])
    assert not torch.equal(plain.eval()(tokens)[0], cool.eval()(tokens)[0])
    of_encoder_and_decoder = []
    for scale in (1.0, 2.0):
        torch.manual_seed(2)
        of_encoder_and_decoder.append(routers(translation_model(moe_router_init_scale=scale)))
    for single, double in zip(*of_encoder_and_decoder, strict=True):
        assert torch.equal(double.weight, 2 * single.weight)
    normal = built(moe_router_init_scale=3.0, init_std=0.01)
    assert float(routers(normal)[0].weight.detach().std()) == pytest.approx(0.03, rel=0.2)
