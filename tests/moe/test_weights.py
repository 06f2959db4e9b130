"""What a chosen expert's output is multiplied by: --moe-combine and --moe-output-scale."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_same
from torch import Tensor, nn

from xmoe_fairseq.moe import ExpertChoiceRouter, MoELayer, Router, ThresholdRouter, TopKRouter
from xmoe_fairseq.moe.experts.kernels import use_kernel


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopKRouter(8, 6, 3),
        lambda: ThresholdRouter(8, 6, 0.7),
        lambda: ThresholdRouter(8, 6, 0.15, rule="probability"),
        lambda: ExpertChoiceRouter(8, 6, 2.0),
    ],
)
@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_normalized_weights_are_softmax_over_the_chosen_scores(
    make: Callable[[], Router], kernel: str
) -> None:
    """Gradients too: no score of an expert that was not chosen has any."""
    layer, x = MoELayer(8, 5, 6, make(), combine="normalized"), 2 * torch.randn(30, 8)
    with use_kernel(kernel):
        weights = layer(x)[1].combine_weights()
    scores = F.linear(x, layer.router.weight)
    expected = torch.softmax(scores.masked_fill(weights == 0, -torch.inf), dim=1).nan_to_num()
    assert_same(weights, expected)
    direction = torch.randn_like(weights)
    ours, theirs = (
        torch.autograd.grad((w * direction).sum(), layer.router.weight) for w in (weights, expected)
    )
    assert_same(ours[0], theirs[0], scale=1.0)


def test_what_a_capacity_drops_changes_no_other_weight() -> None:
    torch.manual_seed(2)
    layer, x = (
        MoELayer(8, 5, 6, TopKRouter(8, 6, 3), 0.5, min_capacity=1, combine="normalized"),
        torch.randn(30, 8),
    )
    kept = layer.train()(x)[1].combine_weights()
    whole = layer.eval()(x)[1].combine_weights()
    assert (kept == 0).sum() > (whole == 0).sum()
    assert_same(kept, whole * (kept != 0))


@pytest.mark.parametrize("combine", ["probs", "normalized", "ones"])
@pytest.mark.parametrize("training", [True, False])
def test_a_scale_multiplies_the_output(combine: str, training: bool) -> None:
    layer = MoELayer(8, 5, 6, TopKRouter(8, 6, 3), combine=combine).train(training)
    if layer.output_bias is not None:
        nn.init.normal_(layer.output_bias)
    x = torch.randn(30, 8)
    with torch.set_grad_enabled(training):
        plain, routing = layer(x)
        layer.output_scale = 2.5
        scaled, _ = layer(x)
    bias = 0.0 if layer.output_bias is None else layer.output_bias
    assert_same(scaled - bias, 2.5 * (plain - bias), scale=1.0)
    assert routing.all_ones == (combine == "ones" and not training)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none(scale: float) -> None:
    with pytest.raises(ValueError, match="output_scale must be above 0 and finite"):
        MoELayer(8, 5, 6, TopKRouter(8, 6, 3), output_scale=scale)


def deviation(ffn: Callable[[Tensor], Tensor]) -> float:
    """Of what is added to the residual, of tokens as a layer norm gives them."""
    torch.manual_seed(1)
    return float(ffn(F.layer_norm(torch.randn(500, 256), (256,))).std())


@pytest.mark.parametrize(
    "experts, split, share", [(8, 1, 0.31), (32, 4, 0.17), (64, 4, 0.10), (128, 8, 0.073)]
)
def test_deviations_at_the_start(experts: int, split: int, share: float) -> None:
    """Those that the README's scales are of: with probabilities, and with normalized top-k."""
    dense = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    router = ThresholdRouter(256, experts, 0.9, 2 * split)
    scaled = MoELayer(256, 1024 // split, experts, router, output_scale=1 / share)
    assert deviation(lambda x: scaled(x)[0]) == pytest.approx(deviation(dense), rel=0.1)
    router = TopKRouter(256, experts, split)
    normalized = MoELayer(256, 1024 // split, experts, router, combine="normalized", output_scale=split**0.5)
    assert deviation(lambda x: normalized(x)[0]) == pytest.approx(deviation(dense), rel=0.1)
