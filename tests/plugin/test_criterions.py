"""The loss to minimise, and what is logged about the routing."""

import io
import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fairseq import metrics
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging.meters import AverageMeter, MetersDict
from tolerances import about, assert_same, printed
from toy import language_model, language_sample, sentences, task, translation_model, translation_sample

from xmoe_fairseq.criterions import (
    MoECrossEntropyCriterion,
    MoELabelSmoothedCrossEntropyCriterion,
    routing_log,
)
from xmoe_fairseq.moe import RoutingStats, ThresholdRouter, moe_layers, record_routing


def criterion(
    sentence_avg: bool = False, coeff: float = 0.01, z_coeff: float = 0.0, entropy_coeff: float = 0.0
) -> Any:
    stock = MoELabelSmoothedCrossEntropyCriterion(task(), sentence_avg, 0.1)
    return stock.weigh(coeff, z_coeff, entropy_coeff)


def sample() -> dict[str, Any]:
    return translation_sample(sentences([5, 7, 3], left_pad=True), sentences([6, 4, 8]))


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_auxiliary_losses_are_scaled_by_the_sample_size_and_summed_over_layers(sentence_avg: bool) -> None:
    model, batch = translation_model(), sample()
    with record_routing(model) as records:
        stock, size, _ = LabelSmoothedCrossEntropyCriterion(task(), sentence_avg, 0.1)(model, batch)
    loss, same_size, logged = criterion(sentence_avg, 0.3, 0.2, 0.1)(model, batch)
    assert size == same_size
    entropies = [torch.distributions.Categorical(r.probs_TE).entropy().mean() for _, r in records]
    expected = sum(0.3 * r.load_balance_loss + 0.2 * r.z_loss for _, r in records) + 0.1 * sum(entropies)
    expected = expected * size
    assert len(records) == 3
    assert (loss - stock).item() == about(expected, scale=stock)
    assert logged["loss"].item() == about(stock)  # the task's own


def test_the_entropy_loss_makes_a_threshold_take_fewer_experts() -> None:
    """With exact gradients, also where a probability is 0; and of no tokens it is 0."""
    router, x_TD = ThresholdRouter(4, 6, 0.9).double(), torch.randn(30, 4, dtype=torch.float64)
    scores_TE = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def loss_of(scores_TE: torch.Tensor) -> torch.Tensor:
        routing = router(torch.zeros(len(scores_TE), 4, dtype=torch.float64))
        return replace(routing, probs_TE=torch.softmax(scores_TE, dim=1)).entropy_loss

    assert torch.autograd.gradcheck(loss_of, scores_TE)
    one = torch.tensor([[0.0, -2000.0, 0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    loss = loss_of(one)
    loss.backward()
    assert loss.item() == about(math.log(5)) and not one.grad.any()
    assert loss_of(scores_TE[:0]) == 0
    before, optimizer = router(x_TD).experts_per_token, torch.optim.SGD(router.parameters(), 1.0)
    for _ in range(30):
        optimizer.zero_grad()
        router(x_TD).entropy_loss.backward()
        optimizer.step()
    assert router(x_TD).experts_per_token < before - 1


@pytest.mark.parametrize("coeff", [0.0, 0.01])
def test_a_loss_that_has_overflowed_and_does_not_count_does_no_harm(coeff: float) -> None:
    model = translation_model()
    for layer in moe_layers(model):
        layer.router.weight.data.mul_(1e21)
    loss, _, logged = criterion(coeff=coeff)(model, sample())
    loss.backward()
    assert loss.isfinite() and logged["moe_encoder_z"].isinf().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_auxiliary_losses_reach_the_router_and_nothing_else_in_the_layer() -> None:
    model = translation_model(moe_freq=4, no_moe_decoder=True)
    with record_routing(model) as records:
        model(**sample()["net_input"])
    records[0][1].load_balance_loss.backward()
    layer = records[0][0]
    assert layer.router.weight.grad.abs().sum() > 0
    assert layer.experts.fc1_weight.grad is None


def test_unreduced_loss_is_fairseqs_own() -> None:
    model, batch = translation_model(), sample()
    stock, _, _ = LabelSmoothedCrossEntropyCriterion(task(), False, 0.1)(model, batch, reduce=False)
    loss, _, _ = criterion(coeff=5.0)(model, batch, reduce=False)
    assert torch.equal(loss, stock)


def reduce(logs: list[dict[str, Any]]) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as aggregator:
        MoELabelSmoothedCrossEntropyCriterion.reduce_metrics(logs)
    return aggregator.get_smoothed_values()


def test_logged_values_are_sums_divided_once() -> None:
    """Two ranks (or micro-batches) of different size give what one with all the sentences gives."""
    model = translation_model().eval()
    source, target = sentences([5, 7, 3, 4], left_pad=True), sentences([6, 4, 8, 3])
    parts = [translation_sample(source[:1], target[:1]), translation_sample(source[1:], target[1:])]
    logs = [criterion()(model, part)[2] for part in parts]
    together = reduce([criterion()(model, translation_sample(source, target))[2]])
    apart = reduce(logs)
    keys = {
        "experts_per_token", "flops_vs_all_experts", "flops_vs_dense_ffn", "dropped_share", "router_entropy",
        "load_balance_loss", "load_cv", "max_violation", "dead_experts", "z_loss", "threshold",
    }  # fmt: skip
    names = {f"moe_{side}_{key}" for side in ("encoder", "decoder") for key in keys}
    assert names == {name for name in apart if name.startswith("moe_")}
    for name in names:
        assert apart[name] == printed(together[name], 4)


def test_logged_values_by_hand() -> None:
    """Top-2 of 8 experts, each half the dense FFN, D 32, F 24: a token costs 2 x 4DF, and 2DE to route."""
    model = translation_model(moe_router="topk", moe_topk=2)
    logs, calls = [], {"encoder": [], "decoder": []}
    for batch in (sample(), sample()):
        with record_routing(model) as records:
            logs.append(criterion()(model, batch)[2])
        for layer, routing in records:
            calls[layer.name.split(".")[0]].append(RoutingStats.of(routing))
    values = reduce(logs)
    per_row, router = 4 * 32 * 24, 2 * 32 * 8
    assert {side: len(stats) for side, stats in calls.items()} == {
        "encoder": 4,
        "decoder": 2,
    }  # layers x batches
    for side, stats in calls.items():
        assert values[f"moe_{side}_experts_per_token"] == 2
        of_dense = (2 * per_row + router) / (2 * per_row)
        assert values[f"moe_{side}_flops_vs_dense_ffn"] == printed(of_dense, 4)
        of_all = (2 * per_row + router) / (8 * per_row + router)
        assert values[f"moe_{side}_flops_vs_all_experts"] == printed(of_all, 4)
        assert values[f"moe_{side}_dropped_share"] == 0
        layers = [stats[i] + stats[i + len(stats) // 2] for i in range(len(stats) // 2)]  # over the batches
        for key in ("load_cv", "max_violation", "load_balance_loss", "z_loss"):  # means over layers
            mean = sum(getattr(s, key).item() for s in layers) / len(layers)
            assert mean > 0
            assert values[f"moe_{side}_{key}"] == printed(mean, 4)


def test_values_of_several_updates_are_weighted_by_their_tokens() -> None:
    """fairseq averages what is logged over its log interval."""
    model = translation_model(moe_threshold=0.6).eval()
    source, target = sentences([9, 3, 4], left_pad=True), sentences([9, 3, 4])
    parts = [translation_sample(source[:1], target[:1]), translation_sample(source[1:], target[1:])]
    logs = [criterion()(model, part)[2] for part in parts]
    with metrics.aggregate(new_root=True) as aggregator:
        for log in logs:
            MoELabelSmoothedCrossEntropyCriterion.reduce_metrics([log])
    together = reduce(logs)
    for key in ("decoder_experts_per_token", "encoder_router_entropy", "decoder_load_cv", "decoder_z_loss"):
        averaged = aggregator.get_smoothed_values()[f"moe_{key}"]
        assert averaged == printed(together[f"moe_{key}"], 4)


def test_ratios_are_taken_once_for_all_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq asks for each of them after every update: one after the other they took 5 ms of 160."""
    calls = []
    monkeypatch.setattr(
        routing_log, "ratios", lambda sums, plain=routing_log.ratios: calls.append(1) or plain(sums)
    )
    log = criterion()(translation_model().eval(), sample())[2]
    with metrics.aggregate(new_root=True) as aggregator:
        for update in (1, 2):
            MoELabelSmoothedCrossEntropyCriterion.reduce_metrics([log])
            aggregator.get_smoothed_values()
            assert len(calls) == 2 * update  # of two sides


@pytest.mark.parametrize(
    "other",
    [
        {"moe_num_experts": 4},
        {"encoder_layers": 2, "decoder_layers": 4},
        {"moe_num_experts": 4, "moe_router": "topk"},
    ],
)
def test_a_process_evaluates_another_model(other: dict[str, Any]) -> None:
    """fairseq's default meters, which outlast both."""
    first, second = (criterion()(translation_model(**made).eval(), sample())[2] for made in ({}, other))
    with metrics.aggregate(new_root=True) as aggregator:
        MoELabelSmoothedCrossEntropyCriterion.reduce_metrics([first])
        MoELabelSmoothedCrossEntropyCriterion.reduce_metrics([second])
    of_both, alone, before = aggregator.get_smoothed_values(), reduce([second]), reduce([first])
    assert {k: v for k, v in of_both.items() if "moe" in k} == {k: v for k, v in alone.items() if "moe" in k}
    assert all(alone[key] != before[key] for key in ("moe_encoder_load_cv", "moe_decoder_load_cv"))


def test_meters_go_through_a_checkpoint() -> None:
    """Sums are saved, and go on; a mean of earlier versions, of which no sum is left, begins anew."""
    model = translation_model().eval()
    logs = [criterion()(model, sample())[2] for _ in range(2)]
    together, name = reduce(logs), "moe_decoder_load_cv"
    meters, restored = MetersDict(), MetersDict()
    with patch.object(metrics, "get_active_aggregators", lambda: [meters]):
        MoELabelSmoothedCrossEntropyCriterion.reduce_metrics(logs[:1])
    file = io.BytesIO()
    torch.save(meters.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    restored.add_meter(name, AverageMeter(), 10)
    with patch.object(metrics, "get_active_aggregators", lambda: [restored]):
        MoELabelSmoothedCrossEntropyCriterion.reduce_metrics(logs[1:])
    assert restored.get_smoothed_value(name) == printed(together[name], 4)
    restored.reset()  # as after each log interval
    assert math.isnan(restored.get_smoothed_value(name))
    restored.state_dict()


def test_keys_do_not_depend_on_the_layers_that_layerdrop_leaves_out() -> None:
    """fairseq adds up logging outputs of ranks key by key, in one buffer."""
    model = translation_model(encoder_layerdrop=0.5, moe_freq=4, no_moe_decoder=True).train()
    logs = []
    for seed in range(12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        logs.append(criterion()(model, sample())[2])
    assert len({tuple(log) for log in logs}) == 1
    assert {log["moe_encoder_tokens"].item() for log in logs} == {0.0, 15.0}
    assert len({tuple(value.shape for value in log.values() if torch.is_tensor(value)) for log in logs}) == 1
    reduce(logs)


def test_gradients_of_micro_batches_add_up() -> None:
    """As with --update-freq 2: no state of one batch enters the next one's auxiliary loss."""
    model, batches = translation_model(), [sample(), sample()]

    def gradients(*given: dict[str, Any]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in given:
            criterion(coeff=0.5, z_coeff=0.1)(model, batch)[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    first, second, both = gradients(batches[0]), gradients(batches[1]), gradients(*batches)
    assert_same(both, {name: first[name] + second[name] for name in both})


def test_trains_under_autocast_with_the_router_in_fp32() -> None:
    model, batch = translation_model(), sample()
    exact, _, _ = criterion()(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_routing(model) as records:
        loss, _, _ = criterion()(model, batch)
    loss.backward()
    assert loss.item() == about(exact, dtype=torch.bfloat16, terms=1)
    for layer, routing in records:
        assert routing.probs_TE.dtype == routing.load_balance_loss.dtype == torch.float32
        assert torch.isfinite(layer.router.weight.grad).all() and layer.router.weight.grad.any()


def test_capacity_drops_are_logged() -> None:
    model = translation_model(moe_capacity_factor=0.5, moe_min_capacity=1)
    values = reduce([criterion()(model, sample())[2]])
    assert 0 < values["moe_encoder_dropped_share"] < 1
    model.eval()  # dropless in evaluation, unless asked otherwise
    assert reduce([criterion()(model, sample())[2]])["moe_encoder_dropped_share"] == 0


def test_a_side_without_moe_layers_logs_nothing() -> None:
    model = translation_model(no_moe_decoder=True)
    values = reduce([criterion()(model, sample())[2]])
    assert not any(key.startswith("moe_decoder") for key in values)
    assert any(key.startswith("moe_encoder") for key in values)


def test_a_batch_of_padding_alone_gives_finite_gradients() -> None:
    model = language_model()
    batch = language_sample(sentences([4, 5]))
    batch["net_input"]["src_tokens"] = torch.full((2, 5), 1)
    loss, _, logged = MoECrossEntropyCriterion(task(), False).weigh(0.01, 0.01)(model, batch)
    loss.backward()
    assert logged["moe_decoder_tokens"] == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_thresholds_by_layer_and_their_mean_in_the_log() -> None:
    model = translation_model(moe_layer_thresholds="0, 0.5,1")
    with record_routing(model) as records:
        logs = [criterion()(model, sample())[2] for _ in range(2)]
    assert [layer.name for layer, _ in records[:3]] == [
        "encoder.layers.1", "encoder.layers.3", "decoder.layers.1",
    ]  # fmt: skip
    assert records[0][1].experts_per_token == 1 and records[2][1].experts_per_token == 4  # the limit
    values = reduce(logs)
    assert (values["moe_encoder_threshold"], values["moe_decoder_threshold"]) == (0.25, 1)
    values = reduce([criterion()(translation_model(moe_router="topk"), sample())[2]])
    assert not any("threshold" in name for name in values)


@pytest.mark.parametrize(
    "flag, kwargs",
    [
        ("--moe-loss-coeff", {"coeff": -0.1}),
        ("--moe-z-loss-coeff", {"z_coeff": float("nan")}),
        ("--moe-entropy-coeff", {"entropy_coeff": float("inf")}),
    ],
)
def test_coefficients_are_checked(flag: str, kwargs: dict) -> None:
    with pytest.raises(ValueError, match=f"{flag} must be 0 or more, got"):
        criterion(**kwargs)
