import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_same

from xmoe_fairseq.moe import (
    BaseRouter,
    ExpertChoiceRouter,
    HashRouter,
    MoELayer,
    Router,
    Routing,
    ThresholdRouter,
    TopKRouter,
    step_budgets,
)
from xmoe_fairseq.moe.routers.gshard import GShardLayer
from xmoe_fairseq.moe.rules import RULES


def with_probs(router: Router, probs_TE: list[list[float]]) -> Routing:
    """Route tokens that have exactly these probabilities: an identity router fed with log-probabilities."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(router.num_experts))
    return router(torch.tensor(probs_TE).log())


def chosen(routing: Routing) -> list[list[int]]:
    """Expert ids per token, in order of preference."""
    rows = zip(routing.token_R.tolist(), routing.rank_R.tolist(), routing.expert_R.tolist(), strict=True)
    per_token: list[list[int]] = [[] for _ in range(routing.num_tokens)]
    for token, rank, expert in sorted(rows):
        assert rank == len(per_token[token])
        per_token[token].append(expert)
    return per_token


PROBS = [[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]]


@pytest.mark.parametrize(
    "threshold, limit, expected",
    [
        (0.0, 0, [[1], [0], [0]]),
        (0.4, 0, [[1], [0], [0, 1]]),
        (0.7, 0, [[1, 3], [0], [0, 1, 2]]),
        (0.975, 0, [[1, 3, 2, 0], [0, 1], [0, 1, 2, 3]]),
        (1.0, 0, [[1, 3, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]),
        (1.0, 2, [[1, 3], [0, 1], [0, 1]]),
    ],
)
def test_threshold_takes_experts_until_the_mass_is_reached(threshold, limit, expected) -> None:
    routing = with_probs(ThresholdRouter(4, 4, threshold, limit), PROBS)
    assert chosen(routing) == expected
    weights = routing.combine_weights()
    for token, experts in enumerate(expected):  # not renormalised
        assert_same(weights[token, experts], torch.tensor(PROBS[token])[experts])


@pytest.mark.parametrize(
    "rule, threshold, limit, expected",
    [
        ("probability", 1.0, 0, [[1], [0], [0]]),
        ("probability", 0.25, 0, [[1], [0], [0, 1, 2, 3]]),  # 0.25 itself is enough
        ("probability", 0.2, 0, [[1, 3], [0], [0, 1, 2, 3]]),
        ("probability", 0.12, 0, [[1, 3, 2], [0], [0, 1, 2, 3]]),
        ("probability", 0.0, 0, [[1, 3, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]),
        ("probability", 0.0, 2, [[1, 3], [0, 1], [0, 1]]),
        ("relative", 0.0, 0, [[1], [0], [0, 1, 2, 3]]),  # so is an equal of the best
        ("relative", 0.6, 0, [[1, 3], [0], [0, 1, 2, 3]]),
        ("relative", 0.75, 0, [[1, 3, 2], [0], [0, 1, 2, 3]]),
        ("relative", 0.98, 0, [[1, 3, 2, 0], [0], [0, 1, 2, 3]]),
        ("relative", 1.0, 0, [[1, 3, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]),
        ("relative", 1.0, 2, [[1, 3], [0, 1], [0, 1]]),
    ],
)
def test_rules_by_hand(rule: str, threshold: float, limit: int, expected: list[list[int]]) -> None:
    probs = [[0.1, 0.501, 0.15, 0.249], *PROBS[1:]]
    routing = with_probs(ThresholdRouter(4, 4, threshold, limit, rule=rule), probs)
    assert chosen(routing) == expected
    assert_same(
        routing.weight_R, torch.softmax(torch.tensor(probs).log(), 1)[routing.token_R, routing.expert_R]
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_higher_the_level_the_more_is_taken(rule: str) -> None:
    router, x_TD = ThresholdRouter(8, 12, rule=rule), torch.randn(200, 8) * 3
    taken = torch.zeros(200, 12, dtype=torch.bool)
    numbers = []
    for step in range(33):
        router.fix(router.rule.threshold(step / 32))
        now = router(x_TD).combine_weights() > 0
        assert (now | ~taken).all()  # of what was taken nothing is left out
        taken = now
        numbers.append(int(taken.sum()))
    assert numbers[0] == 200 and numbers[-1] == 200 * 12 and len({*numbers}) > 10


@pytest.mark.parametrize("rule", RULES)
def test_a_token_s_experts_depend_on_it_alone(rule: str) -> None:
    router, x_TD = ThresholdRouter(8, 12, 0.3, rule=rule), torch.randn(40, 8) * 3
    together = router(x_TD).combine_weights() > 0
    apart = torch.cat([router(x_TD[i : i + 1]).combine_weights() > 0 for i in range(40)])
    assert torch.equal(together, apart) and 40 < together.sum() < 40 * 12


def test_threshold_one_takes_experts_whose_probability_underflows() -> None:
    router = ThresholdRouter(4, 4, 1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    assert router(torch.tensor([[500.0, 0.0, 0.0, 0.0]])).experts_per_token == 4


def test_a_fixed_threshold_takes_the_place_of_a_budget() -> None:
    router = ThresholdRouter(4, 8, target_experts_per_token=2)
    saved = router.state_dict()
    router.fix(0.25)
    assert router.threshold_in_use == 0.25 and list(router.state_dict()) == ["weight"]
    router.load_state_dict(saved)  # with the budget's t
    assert router.threshold_in_use == 0.25
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        router.fix(1.5)
    router.fix(0.25, "probability")
    assert router.rule.name == "probability"
    router.fix(0.5)
    assert router.threshold == 0.5 and router.rule.name == "probability"


def test_top_p_takes_what_the_authors_of_the_entropy_loss_take() -> None:
    """By their inference code (arXiv 2403.07652); and the mean entropy of the same probabilities."""
    t, e = torch.arange(1, 7).double().unsqueeze(1), torch.arange(1, 9).double()
    probs_TE = torch.softmax(2 * torch.sin(0.7 * t * e) + torch.cos(0.3 * t * t * e), dim=1)
    taken = {
        0.4: [[1], [0, 5], [6], [4], [5], [7, 4]],
        0.8: [[1, 2, 0], [0, 5, 4], [6, 3], [4, 2, 6], [5, 3], [7, 4, 1, 2]],
    }
    for threshold, expected in taken.items():
        routing = with_probs(ThresholdRouter(8, 8, threshold), probs_TE.tolist())
        assert chosen(routing) == expected
        assert routing.entropy_loss.item() == pytest.approx(1.3601, abs=1e-4)


def test_topk() -> None:
    assert chosen(with_probs(TopKRouter(4, 4, k=2), PROBS)) == [[1, 3], [0, 1], [0, 1]]
    assert chosen(with_probs(TopKRouter(4, 4), PROBS)) == [[1], [0], [0]]


def test_base_assigns_equally_in_training_and_greedily_in_evaluation() -> None:
    router = BaseRouter(3, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    x = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.5], [3.0, 0.0, 0.0]])
    routing = router(x)
    assert chosen(routing) == [[1], [2], [0]]  # total 7.5; every other assignment has less
    assert_same(routing.weight_R[routing.token_R.argsort()], torch.sigmoid(torch.tensor([2.0, 2.5, 3.0])))
    assert routing.load_balance_loss == 0
    assert chosen(router.eval()(x)) == [[0], [0], [0]]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8])
def test_base_never_gives_an_expert_more_than_its_share(num_tokens: int) -> None:
    routing = BaseRouter(5, 4)(torch.randn(num_tokens, 5))
    assert sorted(routing.token_R.tolist()) == list(range(num_tokens))
    assert routing.rows_per_expert().max() <= -(-num_tokens // 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_computes_in_fp32_under_low_precision(dtype: torch.dtype) -> None:
    router = ThresholdRouter(16, 8, 0.9).to(dtype)
    x = torch.randn(32, 16, dtype=dtype)
    routing = router(x)
    expected = torch.softmax(x.float() @ router.weight.float().T, dim=-1)
    assert routing.probs_TE.dtype == torch.float32
    assert_same(routing.probs_TE, expected)


def test_router_ignores_autocast() -> None:
    router, x = ThresholdRouter(16, 8, 0.9), torch.randn(32, 16)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)
    assert torch.equal(inside.probs_TE, plain.probs_TE)  # the same operations


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_is_reported_with_the_layers_name(bad: float) -> None:
    layer = MoELayer(4, 3, 5, ThresholdRouter(4, 5), name="decoder.layers.3")
    x = torch.randn(6, 4)
    x[2, 1] = bad
    with pytest.raises(
        FloatingPointError, match=r"^decoder\.layers\.3: router input holds NaN or inf in 1 of 6 tokens$"
    ):
        layer(x)
    mask = torch.zeros(6, dtype=torch.bool)
    mask[2] = True
    layer(x, mask)  # padding may hold anything


@pytest.mark.parametrize("weight, x", [(float("nan"), 1.0), (3e38, 3e38)])
def test_scores_that_are_not_finite_are_told_from_a_bad_input(weight: float, x: float) -> None:
    layer = MoELayer(4, 3, 5, ThresholdRouter(4, 5), name="encoder.layers.1")
    with torch.no_grad():
        layer.router.weight.fill_(weight)
    with pytest.raises(
        FloatingPointError, match=r"^encoder\.layers\.1: router scores are NaN or inf in 6 of 6"
    ):
        layer(torch.full((6, 4), x))


def any_layer(router: str) -> MoELayer:
    match router:
        case "gshard":
            return GShardLayer(4, 3, 5, torch.relu)
        case "hash":
            return MoELayer(4, 3, 5, HashRouter(4, 5, torch.arange(9) % 5))
        case "base":
            return MoELayer(4, 3, 5, BaseRouter(4, 5))
        case "expert_choice":
            return MoELayer(4, 3, 5, ExpertChoiceRouter(4, 5))
        case "budget":
            return MoELayer(4, 3, 5, ThresholdRouter(4, 5, target_experts_per_token=1.5))
        case "probability" | "relative":
            return MoELayer(4, 3, 5, ThresholdRouter(4, 5, target_experts_per_token=1.5, rule=router))
        case "ones":
            return MoELayer(4, 3, 5, ThresholdRouter(4, 5, 0.5), combine="ones")
        case "capacity":
            return MoELayer(4, 3, 5, ThresholdRouter(4, 5), capacity_factor=1.0, min_capacity=1)
    return MoELayer(4, 3, 5, TopKRouter(4, 5, 2))


@pytest.mark.parametrize(
    "router",
    [
        "topk",
        "budget",
        "probability",
        "relative",
        "ones",
        "capacity",
        "hash",
        "base",
        "expert_choice",
        "gshard",
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_in_fp16_training_reaches_the_loss_scaler(router: str, bad: float) -> None:
    """As NaN in the output and in gradients. Elsewhere nobody would see to it, and it is an error."""
    layer = any_layer(router).half()
    x, ids = torch.randn(300, 4), torch.arange(300) % 9  # enough for the packed sort
    x[2] = bad
    token_ids = ids if router == "hash" else None
    y, _ = layer(x.half(), token_ids=token_ids)
    y.sum().backward()
    assert not y[2].isfinite().all()
    assert any(not p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    if router in ("budget", "probability", "relative"):
        step_budgets(layer)
        assert layer.router.budget.threshold.isfinite()
    for other, dtype in ((layer.eval(), torch.half), (any_layer(router), torch.float)):
        with pytest.raises(FloatingPointError, match="NaN or inf"):
            other(x.to(dtype), token_ids=token_ids)


def layer_with(**arguments: Any) -> Callable[[], MoELayer]:
    sizes = {"model_dim": 4, "expert_dim": 3, "num_experts": 5}
    return lambda: MoELayer(**sizes | {"router": ThresholdRouter(4, 5)} | arguments)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ThresholdRouter(4, 4, 1.5), r"threshold must be in \[0, 1\], got 1.5"),
        (lambda: ThresholdRouter(4, 4, -0.1, rule="relative"), r"threshold must be in \[0, 1\], got -0.1"),
        (
            lambda: ThresholdRouter(4, 4, rule="best"),
            "rule must be one of mass, probability, relative, got best",
        ),
        (lambda: ThresholdRouter(4, 4, 0.5, -1), "max_experts_per_token must be 0 .* got -1"),
        (lambda: ThresholdRouter(4, 4, 0.5, 1.5), "max_experts_per_token must be 0 .* got 1.5"),
        (lambda: TopKRouter(4, 4, 5), r"k must be a whole number in \[1, num_experts = 4\], got 5"),
        (lambda: TopKRouter(4, 4, 0), "k must be a whole number"),
        (lambda: TopKRouter(4, 4, 1.5), "k must be a whole number .* got 1.5"),
        (lambda: ThresholdRouter(4, 0), "must be at least 1, got 4 and 0"),
        (
            lambda: MoELayer(4, 3, 5, ThresholdRouter(4, 5), 0.0, float("nan")),
            "must be 0 or more, and finite, got 0.0, nan",
        ),
        (layer_with(eval_capacity_factor=float("inf")), "must be 0 or more, and finite, got 0.0, inf"),
        (layer_with(expert_dim=0), "expert_dim must be at least 1, got 0"),
        (layer_with(dense_ffn_dim=-1), "dense_ffn_dim must be at least 1, or None, got -1"),
        (layer_with(activation_dropout=1.5), r"activation_dropout must be in \[0, 1\], got 1.5"),
        (lambda: MoELayer(4, 3, 5, ThresholdRouter(4, 6)), r"router must be for .* \(5, 4\), got \(6, 4\)"),
        (layer_with(capacity_factor=-1), "must be 0 or more, and finite, got -1"),
        (layer_with(activation="step"), "activation must be one of .* 'step'"),
    ],
)
def test_bad_arguments_get_one_clear_line(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_padding_mask_gets_one_clear_line() -> None:
    layer = MoELayer(4, 3, 5, ThresholdRouter(4, 5))
    with pytest.raises(
        ValueError, match=r"padding_mask must be bool of shape \(2, 3\), got torch.bool of shape \(3, 2\)"
    ):
        layer(torch.randn(2, 3, 4), torch.zeros(3, 2, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_tokens_of_another_width_get_one_clear_line(shape: tuple[int, ...]) -> None:
    layer = MoELayer(4, 3, 5, ThresholdRouter(4, 5))
    with pytest.raises(ValueError, match=rf"x must be of shape \(..., 4\), got {re.escape(str(shape))}"):
        layer(torch.randn(shape))


def test_scores_whose_sum_overflows_are_finite_all_the_same() -> None:
    router = TopKRouter(4, 3)
    torch.nn.init.ones_(router.weight)
    logits_TE = router.score(torch.full((5, 4), 5e37))
    assert torch.isinf(logits_TE.sum()) and torch.isfinite(logits_TE).all()
