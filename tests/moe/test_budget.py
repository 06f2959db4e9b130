"""The controller of a compute budget: which t it wants, how it goes there, who counts."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tolerances import about, assert_same
from torch import Tensor, nn

from xmoe_fairseq.moe import MoELayer, ThresholdRouter, step_budgets
from xmoe_fairseq.moe.budget import BINS, MANY, RATE, level_for
from xmoe_fairseq.moe.rules import RULES


def router(
    target: float = 2.0, spread: float = 1.0, limit: int = 6, rule: str = "mass", num_experts: int = 12
) -> ThresholdRouter:
    made = ThresholdRouter(16, num_experts, 0.9, limit, target, rule)
    with torch.no_grad():
        made.weight.mul_(spread)
    return made


def average(made: ThresholdRouter, x_TD: Tensor, t: float) -> float:
    """Experts per token within the limit, token by token."""
    taken = 0
    for probs_E in torch.softmax(x_TD @ made.weight.detach().T, dim=-1).tolist():
        best = sorted(probs_E, reverse=True)[: made.limit]
        match made.rule.name:
            case "mass":
                passing = [p for rank, p in enumerate(best) if sum(best[:rank]) < t]
            case "probability":
                passing = [p for p in best if p >= t]
            case "relative":
                passing = [p for p in best if p >= (1 - t) * best[0]]
        taken += max(len(passing), 1)
    return taken / len(x_TD)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", [1.0, 1.5, 2.0, 3.3, 6.0])
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_the_first_step_goes_where_a_search_over_all_thresholds_ends(
    target: float, spread: float, rule: str
) -> None:
    made, x_TD = router(target, spread, rule=rule), torch.randn(700, 16)
    for part_TD in x_TD.split(200):  # micro-batches
        made(part_TD)
    step_budgets(made)
    low, high, got = 0.0, 1.0, float(made.budget.threshold)
    while high - low > 1 / (4 * BINS):  # of the level
        middle = (low + high) / 2
        costs_too_much = average(made, x_TD, made.rule.threshold(middle)) > target
        low, high = (low, middle) if costs_too_much else (middle, high)
    searched = made.rule.threshold(low)
    if target < made.limit:  # there any higher level does as well
        # at most a bin away, or the whole gap between two choices where no t would change anything
        assert abs(got - searched) <= 2 / BINS or average(made, x_TD, got) == target
    assert made.eval()(x_TD).experts_per_token == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("target", [1.0, 2.0, 3.5])
def test_before_any_data_no_more_than_the_budget_is_taken(target: float, spread: float, rule: str) -> None:
    if rule == "relative" and spread == 0:
        pytest.skip("all are as good as the best, and no threshold takes fewer")
    assert router(target, spread, rule=rule)(torch.randn(300, 16)).experts_per_token <= target


@pytest.mark.parametrize("rule", ["mass", "probability"])
@pytest.mark.parametrize("alike", range(1, 13))
def test_nor_whatever_the_router_prefers(alike: int, rule: str) -> None:
    """Some of its experts share all the probability."""
    made = ThresholdRouter(12, 12, target_experts_per_token=3.5, rule=rule)
    torch.nn.init.eye_(made.weight)
    x_TD = torch.zeros(1, 12)
    x_TD[0, :alike] = 100.0
    assert made(x_TD).experts_per_token <= 3


@pytest.mark.parametrize("rule", RULES)
def test_among_many_experts_a_budget_is_met_too(rule: str) -> None:
    """Each with hardly any probability."""
    made, x_TD = router(4.0, 0.3, limit=0, rule=rule, num_experts=512), torch.randn(300, 16)
    made(x_TD)
    step_budgets(made)
    assert made.eval()(x_TD).experts_per_token == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_later_steps_go_part_of_the_way_and_follow_a_router_that_becomes_decisive(rule: str) -> None:
    made, x_TD = router(2.0, rule=rule), torch.randn(500, 16)
    made(x_TD)
    step_budgets(made)
    before = made.budget.threshold.clone()
    with torch.no_grad():
        made.weight.mul_(4)
    first = made(x_TD).experts_per_token
    wanted = made.rule.threshold(level_for(made.budget._counts_C.unsqueeze(0), torch.tensor([2.0])))
    step_budgets(made)
    assert_same(made.budget.threshold, (before + RATE * (wanted - before)).float().squeeze())
    for _ in range(12):
        made(x_TD)
        step_budgets(made)
    assert first < 1.5 or rule == "probability"  # the old t is too small now; tau goes on to fit
    assert made(x_TD).experts_per_token == pytest.approx(2.0, abs=0.02)


def test_evaluation_and_batches_that_do_not_count_leave_the_threshold_alone() -> None:
    made = router()
    made.eval()(torch.randn(50, 16))
    made.train().counting = False
    made(torch.randn(50, 16))
    step_budgets(made)
    assert float(made.budget.threshold) == about(2 / 12)
    made.counting = True
    made(torch.randn(0, 16))  # a layer without tokens
    step_budgets(made)
    assert float(made.budget.threshold) == about(2 / 12)
    made(torch.randn(50, 16))
    step_budgets(made)
    assert float(made.budget.threshold) != about(2 / 12)


def test_a_loop_that_never_steps_is_told_so() -> None:
    made = router(2.5)
    for _ in range(MANY - 1):
        made(torch.randn(2, 16))
    with pytest.warns(UserWarning, match=r"target_experts_per_token=2.5: .*call .*step_budgets\(model\)"):
        made(torch.randn(2, 16))
    made = router(2.5)
    step_budgets(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(MANY + 1):  # micro-batches
            made(torch.randn(2, 16))


def test_a_budget_that_no_threshold_meets_is_told() -> None:
    """All tokens alike take 1 or 2 experts, never 1.5."""
    alike, made = router(1.5, spread=0.0), router(1.5)
    x_TD = torch.randn(10, 16)

    def train(steered: ThresholdRouter) -> None:
        for _ in range(MANY):
            steered(x_TD)
            step_budgets(steered)

    with pytest.warns(UserWarning, match="target_experts_per_token=1.5: .* have taken 2.00 experts"):
        train(alike)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(made)


def test_a_token_takes_the_same_experts_in_any_batch() -> None:
    made = router(spread=3.0)
    made(torch.randn(200, 16))
    step_budgets(made)
    made.eval()
    x_TD = torch.randn(40, 16)
    together = made(x_TD).combine_weights()
    apart = torch.cat([made(x_TD[i : i + 1]).combine_weights() for i in range(40)])
    assert torch.equal(together > 0, apart > 0)


def test_all_experts_are_taken_where_the_budget_is_all() -> None:
    """Also those whose mass before is rounded to 1."""
    made = ThresholdRouter(4, 4, target_experts_per_token=4.0)
    with torch.no_grad():
        made.weight.copy_(torch.eye(4))
    x_TD = torch.tensor([[500.0, 0.0, 0.0, 0.0]])
    assert made(x_TD).experts_per_token == 4  # t begins at 4 / 4
    step_budgets(made)
    assert made(x_TD).experts_per_token == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_threshold_keeps_its_precision(dtype: torch.dtype) -> None:
    made = router()
    made(torch.randn(50, 16))
    step_budgets(made)
    exact = made.budget.threshold.clone()
    half = copy.deepcopy(made).to(dtype)
    assert half.weight.dtype == dtype
    assert half.budget.threshold.dtype == torch.float32 and torch.equal(half.budget.threshold, exact)
    half(torch.randn(50, 16, dtype=dtype))
    step_budgets(half)
    assert half.budget.threshold.dtype == torch.float32
    assert set(half.state_dict()) == {"weight", "budget.threshold"}
    made.double()
    assert made(torch.randn(9, 16).double()).probs_TE.dtype == torch.float64
    assert torch.equal(made.budget.threshold, exact)


def test_state_dicts_with_and_without_a_budget() -> None:
    steered, fixed = router(), ThresholdRouter(16, 12, 0.5, 6)
    steered.budget.threshold.fill_(0.3)
    fixed.load_state_dict(steered.state_dict())  # the checkpoint of a budget, opened with a t of one's own
    assert fixed.threshold == 0.5 and torch.equal(fixed.weight, steered.weight)
    other = router()
    other.load_state_dict(steered.state_dict())
    assert float(other.budget.threshold) == about(0.3)
    other = router()
    other.load_state_dict(fixed.state_dict())  # a budget for what was trained without one
    assert float(other.budget.threshold) == about(2 / 12)


def test_a_budget_by_another_rule_begins_anew() -> None:
    """A t of one rule says nothing to another."""
    saved = {}
    for rule in RULES:
        made = router(rule=rule)
        made.budget.threshold.fill_(0.3)
        saved[rule] = made.state_dict()
    assert [[*state][1] for state in saved.values()] == [
        "budget.threshold", "budget.threshold_probability", "budget.threshold_relative"
    ]  # fmt: skip
    for mine, start in zip(RULES, (2 / 12, 1 / 2, 0.0), strict=True):
        for theirs, state in saved.items():
            made, fixed = router(rule=mine), ThresholdRouter(16, 12, 0.5, 6, rule=mine)
            made.load_state_dict(state)
            fixed.load_state_dict(state)
            assert float(made.budget.threshold) == about(0.3 if mine == theirs else start)
            assert list(fixed.state_dict()) == ["weight"]


def layers(rule: str) -> nn.ModuleList:
    torch.manual_seed(3)
    return nn.ModuleList([MoELayer(16, 4, 12, router(target, rule=rule)) for target in (2.0, 3.0)])


def thresholds(model: nn.ModuleList, batches: list[list[Tensor]]) -> Tensor:
    """After each update, of both layers; an update has several micro-batches."""
    found = []
    for micro_batches in batches:
        for x_TD in micro_batches:
            for layer in model:
                layer(x_TD)
        step_budgets(model)
        found.append(torch.stack([layer.router.budget.threshold.clone() for layer in model]))
    return torch.stack(found)


@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_go_as_one_that_saw_all_tokens(rule: str) -> None:
    sizes = [(30, 7), (0, 5), (12, 12)]  # tokens of each rank; one has none
    parts = [[torch.randn(size, 16) for size in pair] for pair in sizes]

    def rank() -> Tensor:
        mine = [[pair[dist.get_rank()]] for pair in parts]
        return thresholds(layers(rule), mine)

    alone = thresholds(layers(rule), parts)
    for found in run_ranks(2, rank):
        assert torch.equal(found, alone)
    assert len(alone.unique()) == 6


@pytest.mark.parametrize("target", [0.5, -1.0, 7.0, float("nan")])
def test_a_target_out_of_range_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_experts_per_token must be 0 .* a token may take, 6, got"):
        router(target)
