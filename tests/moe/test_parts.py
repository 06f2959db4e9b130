"""Capacity, dispatch, experts, losses and statistics on layouts worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import about, assert_same
from torch import Tensor, nn

from xmoe_fairseq.moe import (
    BaseRouter,
    Experts,
    MoELayer,
    Router,
    Routing,
    RoutingStats,
    ThresholdRouter,
    TopKRouter,
    record_routing,
)
from xmoe_fairseq.moe.capacity import expert_capacity, keep_within_capacity
from xmoe_fairseq.moe.dispatch.local import LocalDispatcher
from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.losses import load_balance_loss, z_loss
from xmoe_fairseq.moe.stats import load_cv, max_violation


def routing_of(rows: list[tuple[int, int, int, float]], num_tokens: int, num_experts: int) -> Routing:
    """rows: (token, expert, rank, weight)."""
    token, expert, rank, weight = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Routing(
        token_R=torch.tensor(token, dtype=torch.long),
        expert_R=torch.tensor(expert, dtype=torch.long),
        rank_R=torch.tensor(rank, dtype=torch.long),
        weight_R=torch.tensor(weight),
        probs_TE=torch.full((num_tokens, num_experts), 1 / num_experts),
        rows_wanted=len(rows),
        load_balance_of=lambda: torch.tensor(1.0),
        z_loss_of=lambda: torch.tensor(0.0),
    )


@pytest.mark.parametrize(
    "tokens, experts, factor, minimum, expected",
    [
        (96, 8, 1.0, 4, 12),
        (8, 8, 1.0, 4, 4),
        (10, 4, 1.0, 1, 3),
        (10, 4, 1.3, 1, 4),
        (0, 4, 2.0, 4, 4),
        (3, 7, 0.5, 1, 1),
        (96, 8, 1e308, 4, 96),
        (96, 8, 1e308, 10**30, 10**30),
    ],
)
def test_capacity(tokens: int, experts: int, factor: float, minimum: int, expected: int) -> None:
    assert expert_capacity(tokens, experts, factor, minimum) == expected


def test_a_capacity_without_bounds_keeps_all() -> None:
    layer = MoELayer(4, 3, 5, TopKRouter(4, 5, 2), capacity_factor=1e308, min_capacity=10**30)
    assert layer(torch.randn(7, 4))[1].token_R.numel() == 14


def test_capacity_keeps_first_choices_before_second_ones_then_by_probability() -> None:
    rows = [
        (0, 1, 0, 0.5), (0, 0, 1, 0.45),  # expert 0 is token 0's second choice, however probable
        (1, 0, 0, 0.3), (1, 1, 1, 0.2),
        (2, 0, 0, 0.4),
        (3, 1, 0, 0.5),
    ]  # fmt: skip
    kept = keep_within_capacity(routing_of(rows, 4, 3), capacity=2)
    assert list(zip(kept.token_R.tolist(), kept.expert_R.tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (2, 0),
        (3, 1),
    ]
    one = keep_within_capacity(routing_of(rows, 4, 3), capacity=1)
    assert list(zip(one.token_R.tolist(), one.expert_R.tolist(), strict=True)) == [
        (0, 1),
        (2, 0),
    ]  # tie: earlier token
    assert one.rows_wanted == 6
    assert one.experts_per_token == 0.5


def test_dispatch_lays_rows_out_by_expert() -> None:
    x = torch.arange(4.0).unsqueeze(1) + 1  # tokens 1, 2, 3, 4
    rows = [(0, 2, 0, 1.0), (0, 0, 1, 0.5), (1, 2, 0, 1.0), (3, 0, 0, 2.0)]  # token 2 and expert 1 have none
    x_SD, laid_out, sent = LocalDispatcher().dispatch(x, routing_of(rows, 4, 3))
    assert x_SD is x
    assert laid_out.source_R.tolist() == [0, 3, 0, 1]
    assert laid_out.weight_R.tolist() == [0.5, 2.0, 1.0, 1.0]
    assert laid_out.counts_E.tolist() == [2, 0, 2]
    assert LocalDispatcher().combine(x, sent) is x
    # rows of experts 0, 0, 2, 2 give 1, 10, 100, 1000
    sums_TD = laid_out.weighted_sum(torch.tensor([[1.0], [10.0], [100.0], [1000.0]]), 4)
    assert sums_TD.flatten().tolist() == [0.5 + 100, 1000, 0, 20]


def test_dispatch_without_rows() -> None:
    laid_out = ExpertRows.of(routing_of([], 3, 2))
    assert laid_out.source_R.shape == (0,)
    assert laid_out.counts_E.tolist() == [0, 0]
    assert laid_out.weighted_sum(torch.ones(0, 2), 3).tolist() == [[0, 0]] * 3


class Tagged(nn.Module):
    """Expert e multiplies by e + 1, so a misrouted row shows; counts the rows that it computed."""

    def forward(self, x_SD: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        self.rows = rows.source_R.numel()
        tags_R = torch.repeat_interleave(rows.counts_E) + 1
        weighted_RD = x_SD[rows.source_R] * (tags_R * rows.weight_R).unsqueeze(1)
        return torch.zeros_like(x_SD).index_add(0, rows.source_R, weighted_RD)


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_every_row_reaches_its_expert_and_only_chosen_rows_are_computed(capacity_factor: float) -> None:
    layer = MoELayer(6, 4, 5, ThresholdRouter(6, 5, 0.6), capacity_factor, min_capacity=1)
    layer.experts = Tagged()
    x = torch.randn(40, 6)
    y, routing = layer(x)
    factor_T = (routing.combine_weights() * (torch.arange(5) + 1)).sum(dim=1, keepdim=True)
    assert_same(y, x * factor_T)
    assert layer.experts.rows == int((routing.combine_weights() > 0).sum())


def test_experts_start_different_and_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    first = Experts(4, 8, 6)
    torch.manual_seed(3)
    second = Experts(6, 8, 6)
    assert torch.equal(first.fc1_weight, second.fc1_weight[:4])
    for e in range(1, 4):
        assert not torch.equal(first.fc1_weight[0], first.fc1_weight[e])
    bound = 8**-0.5
    assert 0.9 * bound < first.fc1_weight.abs().max() <= bound


def rows_in_turn(rows_per_expert: list[int]) -> ExpertRows:
    """Row r is of source row r."""
    return ExpertRows(torch.arange(sum(rows_per_expert)), None, torch.tensor(rows_per_expert))


@pytest.mark.parametrize("rows_per_expert", [[0, 0, 0], [2, 0, 0], [0, 1, 3]])
def test_every_parameter_has_a_gradient_whatever_the_load(rows_per_expert: list[int]) -> None:
    experts = Experts(3, 4, 5)
    experts(torch.randn(sum(rows_per_expert), 4), rows_in_turn(rows_per_expert)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        for e, rows in enumerate(rows_per_expert):
            assert bool(parameter.grad[e].any()) == (rows > 0)


@pytest.mark.parametrize(
    "module, function",
    [(nn.ReLU(inplace=True), F.relu), (nn.GELU(), F.gelu), (nn.SiLU(), F.silu), (nn.Tanh(), torch.tanh)],
    ids=["relu", "gelu", "silu", "tanh"],  # a function's own name holds an address
)
def test_a_module_that_is_a_function_is_computed_as_one(module: nn.Module, function: Any) -> None:
    assert Experts(1, 4, 8, module).activation is function
    x = torch.randn(100)
    assert torch.equal(function(x), module(x.clone()))


def test_a_module_that_is_another_function_stays() -> None:
    class Leaky(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(x)

    for module in (nn.GELU(approximate="tanh"), Leaky()):
        assert Experts(1, 4, 8, module).activation is module


def test_activation_dropout_is_for_training_only() -> None:
    experts = Experts(1, 4, 64, activation_dropout=0.5)
    x, rows = torch.randn(3, 4), rows_in_turn([3])
    assert not torch.equal(experts(x, rows), experts(x, rows))
    experts.eval()
    assert torch.equal(experts(x, rows), experts(x, rows))


def test_load_balance_loss_by_hand() -> None:
    uniform = torch.full((8, 4), 0.25)
    assert load_balance_loss(uniform, torch.arange(8) % 4).item() == about(1.0)
    one_hot = torch.eye(4)[[2] * 5]
    assert load_balance_loss(one_hot, torch.tensor([2] * 5)).item() == about(4.0)
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])  # mean 0.5, 0.5
    assert load_balance_loss(probs, torch.tensor([0, 0, 1])).item() == about(1.0)
    assert load_balance_loss(torch.empty(0, 4), torch.empty(0, dtype=torch.long)).item() == 0


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (0.6931472**2 + 1.6931472**2) / 2
    assert z_loss(logits).item() == about(expected)
    assert z_loss(torch.empty(0, 4)).item() == 0


def test_load_cv_by_hand() -> None:
    assert load_cv(torch.tensor([2, 2, 2])).item() == 0
    assert load_cv(torch.tensor([4, 0])).item() == about(1.0)
    assert load_cv(torch.tensor([0, 0])).item() == 0


def test_max_violation_by_hand() -> None:
    rows_LE = torch.tensor([[2, 2, 2], [6, 0, 0], [3, 2, 1], [0, 0, 0]])
    assert max_violation(rows_LE).tolist() == [0, 2, 0.5, 0]


@pytest.mark.parametrize("router", [ThresholdRouter, TopKRouter, BaseRouter])
def test_ratios_do_not_depend_on_how_the_tokens_are_cut(router: type[Router]) -> None:
    layer = MoELayer(6, 4, 5, router(6, 5)).eval()
    x_TD, totals = torch.randn(64, 6), []
    for size in (64, 8, 1):
        calls = [RoutingStats.of(layer(part_TD)[1]) for part_TD in x_TD.split(size)]
        totals.append(sum(calls, RoutingStats.zeros(5, x_TD.device)))
    for total in totals[1:]:
        for name in ("load_cv", "load_balance_loss", "z_loss", "entropy", "rows_kept"):
            assert_same(getattr(total, name), getattr(totals[0], name), dtype=torch.float32)
    routing = layer(x_TD)[1]
    if router is not BaseRouter:  # which trains none; of one call they are what is trained
        assert_same(totals[0].load_balance_loss.float(), routing.load_balance_loss.detach())
    assert_same(totals[0].z_loss.float(), routing.z_loss.detach())


def test_collapse_shows_in_load_cv_where_the_balance_loss_is_1() -> None:
    """7 of 32 experts take all first choices of a router that is nearly uniform."""
    probs_TE = torch.full((70, 32), 1 / 32)
    first_T = torch.arange(70) % 7
    probs_TE[torch.arange(70), first_T] += 1e-3
    rows = [(token, int(expert), 0, 1.0) for token, expert in enumerate(first_T)]
    stats = RoutingStats.of(replace(routing_of(rows, 70, 32), probs_TE=probs_TE))
    assert stats.load_balance_loss.item() == pytest.approx(1.0, abs=0.01)
    assert stats.load_cv.item() == about((32 / 7 - 1) ** 0.5)  # 1.89


def test_statistics_are_sums_that_add_up() -> None:
    layer = MoELayer(6, 4, 5, ThresholdRouter(6, 5, 0.6), capacity_factor=1.0, min_capacity=1)
    parts = [layer(torch.randn(n, 6))[1] for n in (7, 0, 12)]
    total = RoutingStats.of(parts[0]) + RoutingStats.of(parts[1]) + RoutingStats.of(parts[2])
    assert total.tokens.item() == 19
    assert total.rows_kept.item() == sum(p.token_R.numel() for p in parts)
    assert total.rows_wanted.item() == sum(p.rows_wanted for p in parts)
    assert total.rows_kept < total.rows_wanted
    entropy = sum(
        torch.distributions.Categorical(probs=p.probs_TE).entropy().sum() for p in parts if p.num_tokens
    )
    assert total.entropy.item() == about(entropy)


def test_record_routing_sees_each_call_once_and_leaves_nothing_behind() -> None:
    model = nn.ModuleList(MoELayer(4, 3, 5, TopKRouter(4, 5), name=f"layer {i}") for i in range(2))
    with record_routing(model) as records:
        for layer in (model[0], model[1], model[0]):
            layer(torch.randn(3, 4))
    assert [layer.name for layer, _ in records] == ["layer 0", "layer 1", "layer 0"]
    model[0](torch.randn(3, 4))
    assert len(records) == 3
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"weight_R": torch.ones(4, dtype=torch.bfloat16)},
            "weight_R .R,. in torch.float32 at least, got .*bf",
        ),
        ({"weight_R": torch.ones(4, 1)}, r"weight_R \(R,\) .*, got torch.float32, \(4, 1\)"),
        ({"weight_R": torch.ones(3)}, r"token_R of the size of weight_R, \(3,\), got \(4,\)"),
        ({"rank_R": torch.zeros(3)}, r"rank_R of the size of weight_R, \(4,\), got \(3,\)"),
        ({"probs_TE": torch.ones(1, 3)}, r"probs_TE of shape \(2, 3\), got \(1, 3\)"),
    ],
)
def test_what_a_router_of_somebodys_own_gives_is_looked_at(change: dict[str, Tensor], message: str) -> None:
    """Each of these was passed over: in training, without a capacity, or but for one kernel."""

    class Own(TopKRouter):
        def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
            return replace(super().forward(x_TD, ids_T), **change)

    layer = MoELayer(8, 4, 3, Own(8, 3, 2), name="layer 7")
    with pytest.raises(ValueError, match=f"^layer 7: Own must give {message}"):
        layer(torch.randn(2, 8))
