"""DynMoE's router: its authors' numbers, its choices by hand, what trains its thresholds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import about, assert_same
from torch import Tensor

from xmoe_fairseq.moe import MoELayer, TopAnyRouter

GOLDEN = Path(__file__).parents[1] / "golden" / "router_topany.npz"


def golden() -> tuple[dict[str, Tensor], TopAnyRouter]:
    arrays = {name: torch.tensor(array) for name, array in np.load(GOLDEN).items()}
    router = TopAnyRouter(6, 5)
    router.weight.data, router.threshold_E.data = arrays["router_weight"], arrays["threshold"]
    router.temperature = arrays["temperature"].item()
    return arrays, router


def test_the_authors_numbers() -> None:
    """In evaluation all; in training of the tokens to which theirs gives an expert."""
    arrays, router = golden()
    assert_same(router.eval()(arrays["x"]).combine_weights(), arrays["combine_weights"])
    x_TD = arrays["x"].requires_grad_()
    routing = router.train()(x_TD)
    served_T = arrays["training_weights"].sum(dim=1) > 0
    assert 0 < (~served_T).sum() < 5
    assert_same(routing.combine_weights()[served_T], arrays["training_weights"][served_T])
    assert_same(routing.combine_weights(), arrays["combine_weights"])
    assert_same(routing.load_balance_loss, arrays["loss"])
    ((routing.combine_weights() * arrays["grad_output"]).sum() + routing.load_balance_loss).backward()
    assert_same(router.threshold_E.grad, arrays["grad_threshold"])
    assert_same(router.weight.grad, arrays["grad_router_weight"])
    assert_same(x_TD.grad, arrays["grad_x"])


def axes(*threshold: float, limit: int = 0) -> TopAnyRouter:
    """The experts are the axes, so the scores are the normalised input."""
    router = TopAnyRouter(len(threshold), len(threshold), limit)
    router.weight.data, router.threshold_E.data = torch.eye(len(threshold)) * 7, torch.tensor(threshold)
    return router


def test_choices_by_hand() -> None:
    """Cosines 0.6, 0.8, 0; -0.6, -0.8, 0; 0, 0, 1. The second token passes none, and 0 is its best score."""
    x_TD = torch.tensor([[3.0, 4.0, 0.0], [-3.0, -4.0, 0.0], [0.0, 0.0, 2.0]])
    routing = axes(0.5, 0.5, 0.9)(x_TD)
    assert_same(routing.combine_weights(), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    assert routing.rank_R.tolist() == [1, 0, 0, 0] and routing.expert_R.tolist() == [0, 1, 2, 2]
    # one that passes is before one of a better score that does not
    routing = axes(0.5, 0.9, 0.9)(x_TD[:1])
    assert routing.expert_R.tolist() == [0] and routing.rank_R.tolist() == [0]
    assert_same(axes(0.5, 0.5, 0.9, limit=1)(x_TD).combine_weights()[0], torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("tokens", [8, 300])  # by sorting, by packing
def test_it_begins_with_half_of_the_experts_and_few_pass_a_high_threshold(tokens: int) -> None:
    router, x_TD = TopAnyRouter(16, 8), torch.randn(tokens, 16)
    assert router(x_TD).experts_per_token == pytest.approx(4, abs=1.5)
    assert router(x_TD).load_balance_loss.item() == about(1.0, terms=512)  # orthonormal vectors
    router.threshold_E.data.fill_(0.99)
    assert router(x_TD).experts_per_token == 1


def test_a_threshold_learns_by_what_its_experts_weight_would() -> None:
    layer, x_TD = MoELayer(3, 4, 3, axes(0.0, 0.0, 0.0)), torch.tensor([[3.0, 4.0, 0.0]])
    y_TD, routing = layer(x_TD)
    routing.weight_R.retain_grad()
    y_TD.square().sum().backward()
    weight_grad = dict(zip(routing.expert_R.tolist(), routing.weight_R.grad.tolist(), strict=True))
    # two are taken, so each has the weight 1/2; the sigmoid's slope at 0 is 1/4
    expected = torch.tensor([-weight_grad[0] / 2 / 4, -weight_grad[1] / 2 / 4, 0.0])
    assert sorted(weight_grad) == [0, 1]
    assert_same(layer.router.threshold_E.grad, expected)


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_experts_per_token must be 0 \(no limit\) or a whole.*got -1"):
        TopAnyRouter(3, 3, -1)
    with pytest.raises(ValueError, match="balance must be first with TopAnyRouter, .*got bias"):
        axes(0.0, 0.0).balance_by("bias")
