"""Zero, copy and constant experts: MoE++'s numbers, and where they count. (Their sums: test_oracle.py.)"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_same
from torch import Tensor

from xmoe_fairseq.moe import (
    CheapExperts,
    MoELayer,
    Routing,
    RoutingStats,
    ThresholdRouter,
    TokenRouter,
    TopKRouter,
    step_balance,
    step_budgets,
    use_kernel,
)
from xmoe_fairseq.moe.budget import BINS, TAKEN, TOKENS, Budget
from xmoe_fairseq.moe.losses import share_loss, weigh_cheap
from xmoe_fairseq.moe.rules import RULES
from xmoe_fairseq.moe.stats import ffn_flops

GOLDEN = Path(__file__).parents[1] / "golden" / "cheap_experts.npz"
D, F, E = 8, 5, 4


class Given(TokenRouter):
    """Each token's experts and their weights are given."""

    def __init__(self, expert_TK: Tensor, weight_TK: Tensor) -> None:
        super().__init__(D, 8, 0)
        self.expert_TK, self.weight_TK = expert_TK, weight_TK

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        size = self.expert_TK.shape
        token_R, rank_R = torch.ones(size).nonzero(as_tuple=True)
        none = partial(x_TD.new_zeros, ())
        rows = (token_R, self.expert_TK.flatten(), rank_R, self.weight_TK.flatten())
        return Routing(*rows, x_TD.new_full((size[0], 8), 1 / 8), token_R.numel(), none, none)


def test_the_authors_numbers() -> None:
    arrays = {name: torch.from_numpy(a) for name, a in np.load(GOLDEN).items()}
    ours = torch.tensor([0, 1, 2, 3, 6, 7, 5, 4])  # theirs: 4 FFNs, 2 constant ones, copy, zero
    weight = arrays["weight"].requires_grad_()
    cheap = CheapExperts(D, zero=1, copy=1, constant=2)
    layer = MoELayer(D, F, E, Given(ours[arrays["expert"]], weight), cheap=cheap)
    learned = {"constant": cheap.vector_CD, "wg": cheap.mix.weight}
    learned |= dict(layer.experts.named_parameters())
    for name, parameter in learned.items():
        parameter.data = arrays[name].reshape(parameter.shape)
    x = arrays["x"].requires_grad_()
    y, routing = layer(x)
    assert_same(y, arrays["output"])
    (y * arrays["grad_output"]).sum().backward()
    for name, parameter in {"x": x, "weight": weight, **learned}.items():
        assert_same(parameter.grad, arrays[f"grad_{name}"].reshape(parameter.shape), what=name)
    assert routing.rows_cheap == 11 and routing.token_R.numel() == 13


def layer_with(cheap: CheapExperts, k: int = 2, **how: object) -> MoELayer:
    return MoELayer(D, F, E, TopKRouter(D, E + len(cheap), k), dense_ffn_dim=20, cheap=cheap, **how)


def test_they_are_no_flops_and_no_load() -> None:
    """Tokens 0 and 1 take the zero expert first, token 2 an expert and the one that copies."""
    layer, x_TD = layer_with(CheapExperts(D, 1, 1), shared_experts=1), torch.eye(3, D)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[[4, 1], 0] = torch.tensor([3.0, 2.0])
        layer.router.weight[[4, 5], 1] = torch.tensor([3.0, 2.0])
        layer.router.weight[[1, 5], 2] = torch.tensor([3.0, 2.0])
    _, routing = layer(x_TD)
    assert routing.num_experts == 4 and routing.probs_TE.shape == (3, 6)
    assert routing.combine_weights().count_nonzero(dim=1).tolist() == [1, 0, 1]
    assert routing.experts_per_token == 5 / 3 and routing.rows_wanted == 2
    stats = RoutingStats.of(routing) + RoutingStats.zeros(E, x_TD.device, 2)
    assert stats.rows_kept_E.tolist() == [0, 2, 0, 0] and stats.rows_cheap == 4
    assert stats.first_choices_E.tolist() == [0, 1, 0, 0, 2, 0]
    assert layer.flops(stats)["flops"] == 3 * 2 * D * 6 + ffn_flops(2 + 3, D, F)
    assert layer.flops(stats)["flops_all_experts"] == 3 * 2 * D * 6 + ffn_flops(3 * 5, D, F)
    assert_same(routing.load_balance_loss, share_loss(routing.probs_TE, stats.first_choices_E / 3))


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_capacity_sees_the_others_alone(kernel: str) -> None:
    layer = layer_with(CheapExperts(D, 3), k=3, capacity_factor=1.0, min_capacity=1).train()
    with use_kernel(kernel):
        _, routing = layer(torch.randn(20, D))
    assert routing.rows_per_expert().numel() == E and 0 < routing.rows_per_expert().max() <= 5
    assert routing.rows_wanted + routing.rows_cheap == 60


def test_a_batch_may_take_nothing_else() -> None:
    layer = layer_with(CheapExperts(D, 0, 1), k=1)
    with torch.no_grad():
        layer.router.weight.zero_()[4, 0] = 50.0
    x_TD = torch.ones(3, D, requires_grad=True)
    y_TD, routing = layer(x_TD)
    y_TD.sum().backward()
    assert_same(y_TD, x_TD)
    assert routing.experts_per_token == 0
    assert_same(x_TD.grad, torch.ones(3, D))
    assert layer.experts.fc1_weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_counts_the_others_alone(rule: str) -> None:
    torch.manual_seed(2)
    cheap = CheapExperts(D, 1, 1, 1)
    router = ThresholdRouter(D, 16 + 3, target_experts_per_token=2, rule=rule)
    router.weight.data.mul_(3).add_(torch.arange(19).unsqueeze(1).ge(16) * torch.randn(19, D))
    layer = MoELayer(D, F, 16, router, cheap=cheap).train()
    x_TD = torch.randn(2000, D)
    with torch.no_grad():
        for _ in range(30):
            routing = layer(x_TD)[1]
            step_budgets(layer)
        assert routing.experts_per_token == pytest.approx(2, abs=0.05)
        assert routing.rows_cheap > 400
        assert layer.eval()(x_TD)[1].experts_per_token == pytest.approx(2, abs=0.05)


def test_what_a_budget_counts_by_hand() -> None:
    budget = Budget(2.0, 4)
    mass_TK = torch.tensor([[0.0, 0.4, 0.75], [0.0, 0.5, 0.75]])
    costs_TK = torch.tensor([[True, False, True], [False, True, True]])
    budget.threshold.fill_(0.6)
    taken_TK = budget.take(mass_TK, True, costs_TK)
    assert taken_TK.tolist() == [[True, True, False], [True, True, False]]
    counts = budget.pop_counts()
    in_bins = {bin_: n for bin_, n in enumerate(counts[:BINS].tolist()) if n}
    assert in_bins == {0: -1, BINS // 2: 1, BINS * 3 // 4: 2}
    assert counts[TOKENS] == 2 and 1 + counts[TAKEN] / 2 == 1.0  # one each


def mean_share(balance: str, tau: float) -> Tensor:
    """Of the rows that each of 3 experts and 1 zero expert gets at the end."""
    torch.manual_seed(1)
    layer = MoELayer(D, F, 3, TopKRouter(D, 4, 1), cheap=CheapExperts(D, 1, balance=tau))
    layer.router.balance_by(balance)
    optimizer, x_TD = torch.optim.Adam(layer.parameters(), 0.02), torch.randn(4000, D)
    for _ in range(300):
        optimizer.zero_grad()
        routing = layer(x_TD)[1]
        routing.load_balance_loss.backward()
        optimizer.step()
        step_balance(layer)
    return torch.cat([routing.rows_per_expert(), torch.tensor([routing.rows_cheap])]) / 4000


def test_a_balance_gives_them_their_share() -> None:
    """As an expert gets; with tau = 0.5 twice as much, where f_e is of all choices: 0.2, 0.2, 0.2, 0.4."""
    assert_near = partial(torch.testing.assert_close, rtol=0, atol=0.06)
    assert_near(mean_share("first", 1.0), torch.full((4,), 0.25))
    assert_near(mean_share("all", 0.5), torch.tensor([0.2, 0.2, 0.2, 0.4]))


def test_the_loss_with_tau_by_hand() -> None:
    probs_TE, share_E = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]), torch.tensor([0.5, 0.0, 0.5])
    loss = share_loss(weigh_cheap(probs_TE, 1, 0.75), share_E)
    assert_same(loss, torch.tensor(3 * (0.5 * 0.3 + 0.75 * 0.5 * 0.4)))
    assert weigh_cheap(probs_TE, 0, 0.75) is probs_TE is weigh_cheap(probs_TE, 1, 1.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CheapExperts(D), "must be 0 or more, not all 0"),
        (lambda: CheapExperts(D, 2, -1), "must be 0 or more"),
        (lambda: CheapExperts(D, 1, balance=0.0), "balance must be above 0, got 0.0"),
        (
            lambda: layer_with(CheapExperts(D, 1), combine="ones"),
            "must be probs with cheap experts, got ones",
        ),
        (lambda: layer_with(CheapExperts(D, 1), combine="normalized"), "probs with cheap experts, got norm"),
        (lambda: MoELayer(D, F, E, TopKRouter(D, E), cheap=CheapExperts(D, 1)), r"= \(5, 8\), got \(4, 8\)"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
