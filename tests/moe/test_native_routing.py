"""The choice of experts in C++ is the plain routers' choice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_same
from torch import Tensor

from xmoe_fairseq.moe import MoELayer, RoutingStats, ThresholdRouter, TopKRouter, use_kernel
from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.native import routing as native_routing
from xmoe_fairseq.moe.native.routing import Chosen, choose_experts
from xmoe_fairseq.moe.routing import count
from xmoe_fairseq.moe.rules import RULES

pytestmark = pytest.mark.usefixtures("native_library")

T = TypeVar("T")


def router_of(num_experts: int, **options: Any) -> ThresholdRouter | TopKRouter:
    """Whose scores are its input."""
    kind = TopKRouter if "k" in options else ThresholdRouter
    router = kind(num_experts, num_experts, **options).double()
    router.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def assert_same_rows(chosen: Chosen, plain: Chosen) -> None:
    """In the same order."""
    for name in Chosen._fields:
        assert torch.equal(getattr(chosen, name), getattr(plain, name)), name


def scores(tokens: int, num_experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """With ties: of whole numbers and halves."""
    return (torch.randn(tokens, num_experts) * 4).round().to(dtype) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_experts", [1, 7, 64, 600])
@pytest.mark.parametrize("options", [
    *({"threshold": t} for t in (0, 0.3, 0.9, 1)), {"k": 1},
    *({"threshold": t, "rule": "probability"} for t in (0, 0.01, 0.25, 1)),
    *({"threshold": t, "rule": "relative"} for t in (0, 0.3, 0.9, 1)),
], ids=str)  # fmt: skip
def test_equals_the_plain_routers(
    options: dict[str, Any], num_experts: int, dtype: torch.dtype, threads: int
) -> None:
    logits_TE = scores(300, num_experts, dtype)
    plain = router_of(num_experts, **options).to(dtype).choose_plainly(logits_TE)
    t, rule = options.get("threshold", 1.0), options.get("rule", "mass")
    chosen = choose_experts(logits_TE, options.get("k", num_experts), t, rule=rule)
    assert_same_rows(chosen, plain)


@given(data=st.data())
def test_any_limit_and_threshold(data: st.DataObject) -> None:
    tokens, num_experts = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
    limit, threshold = data.draw(st.integers(1, num_experts)), data.draw(st.floats(0, 1))
    rule, dtype = (
        data.draw(st.sampled_from([*RULES])),
        data.draw(st.sampled_from([torch.float32, torch.float64])),
    )
    logits_TE = scores(tokens, num_experts, dtype)
    if tokens and data.draw(st.booleans()):  # exactly that of a choice
        router = router_of(num_experts, rule=rule, max_experts_per_token=limit).to(dtype)
        values_TK, _ = router.candidates(torch.softmax(logits_TE, dim=1))
        threshold = float(router.rule.cut(data.draw(st.sampled_from(values_TK.flatten().tolist()))))
        threshold = min(max(threshold, 0.0), 1.0)
    router = router_of(num_experts, threshold=threshold, max_experts_per_token=limit, rule=rule).to(dtype)
    plain = router.choose_plainly(logits_TE)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        chosen = choose_experts(logits_TE, limit, threshold, rule=rule)
    assert chosen.rank_R.numel() == 0 or chosen.rank_R.max() < limit
    if tokens:
        assert_same_rows(chosen, plain)
    else:
        assert chosen.counts_E.tolist() == [0] * num_experts and chosen.token_R.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limit", [0, 3])
def test_counts_for_a_budget(limit: int, rule: str, dtype: torch.dtype, threads: int) -> None:
    options = {"max_experts_per_token": limit, "target_experts_per_token": 2, "rule": rule}
    router, logits_TE = router_of(32, **options).to(dtype), scores(900, 32, dtype)
    router.budget.threshold.fill_(router.rule.threshold(0.7))
    router.train()
    plain = router.choose_plainly(logits_TE)
    expected_C = router.budget.pop_counts()
    counts_C = torch.zeros_like(expected_C)
    for times in (1, 2):  # they add up
        chosen = choose_experts(logits_TE, limit or 32, router.budget.threshold, counts_C, rule)
        assert torch.equal(counts_C, times * expected_C)
    assert_same_rows(chosen, plain)


def test_gradients_and_theirs() -> None:
    logits_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def compute(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        chosen = choose_experts(logits_TE, 3, 0.7)
        return chosen.probs_TE, chosen.weight_R

    assert torch.autograd.gradcheck(compute, logits_TE)
    assert torch.autograd.gradgradcheck(compute, logits_TE)
    for output in range(2):  # of which a loss may use one only
        assert torch.autograd.gradcheck(lambda logits_TE, i=output: compute(logits_TE)[i], logits_TE)


def test_gradients_with_threads(threads: int) -> None:
    logits_TE = torch.randn(4000, 32, requires_grad=True)
    chosen = choose_experts(logits_TE, 32, 0.6)
    probs_TE = torch.softmax(logits_TE, dim=1)
    losses = [
        (probs.square().mean() + (weights * torch.linspace(-1, 1, len(weights))).sum())
        for probs, weights in (
            (chosen.probs_TE, chosen.weight_R),
            (probs_TE, probs_TE[chosen.token_R, chosen.expert_R]),
        )
    ]
    got, expected = (torch.autograd.grad(loss, logits_TE)[0] for loss in losses)
    assert_same(got, expected)


@pytest.mark.parametrize("rule", RULES)
def test_nan_takes_each_expert_once_at_most(rule: str) -> None:
    """In training in fp16 it goes on to the loss scaler."""
    logits_TE = torch.randn(3, 8)
    logits_TE[1, 2] = torch.nan
    for threshold in (0.5, 1.0):
        chosen = choose_experts(logits_TE, 8, threshold, torch.zeros(1026, dtype=torch.long), rule)
        pair_R = chosen.token_R * 8 + chosen.expert_R
        assert pair_R.unique().numel() == pair_R.numel()
        assert torch.equal(chosen.counts_E, count(chosen.expert_R, 8))
        assert chosen.weight_R[chosen.token_R == 1].isnan().all()


def in_both_ways(compute: Callable[[], T], monkeypatch: pytest.MonkeyPatch) -> tuple[T, T]:
    got = compute()
    with monkeypatch.context() as patched:
        patched.setattr(native_routing, "missing", lambda: "it is gone")
        return got, compute()


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.6}, {"k": 2}, *({"target_experts_per_token": 2.5, "rule": rule} for rule in RULES)],
    ids=str,
)
@pytest.mark.parametrize("layer_options", [{}, {"combine": "ones"}, {"capacity_factor": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_computes_the_same_bits(
    options: dict[str, Any], layer_options: dict[str, Any], dtype: torch.dtype, threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kind = TopKRouter if "k" in options else ThresholdRouter
    layer = MoELayer(16, 8, 12, kind(16, 12, **options), **layer_options).to(dtype)
    x_TD = torch.randn(700, 16, dtype=dtype).mul_(3).requires_grad_()

    def compute() -> list[Tensor]:
        y_TD, routing = layer(x_TD)
        loss = y_TD.square().sum() + routing.load_balance_loss + routing.z_loss
        grads = torch.autograd.grad(loss, [x_TD, *layer.parameters()])
        stats = vars(RoutingStats.of(routing)).values()
        budget = getattr(layer.router, "budget", None)
        counted = [] if budget is None else [budget.pop_counts()]
        return [y_TD, *grads, *stats, routing.combine_weights(), *counted]

    for mine, plain in zip(*in_both_ways(compute, monkeypatch), strict=True):
        assert torch.equal(mine, plain)


def test_who_chooses_in_cpp() -> None:
    """A router whose class changes nothing of a choice. Not another's own choice, wherever it comes from."""

    class Renamed(ThresholdRouter):
        pass

    class Mixed:
        def combine_weight(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
            return probs_TE / 2

    class Half(Mixed, Renamed):
        pass

    class Few(TopKRouter):
        def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
            expert_TK, _ = super().choose(logits_TE, probs_TE)
            chosen_TK = torch.ones_like(expert_TK, dtype=torch.bool)
            chosen_TK[1:, 1:] = False
            return expert_TK, chosen_TK

    class One(ThresholdRouter):
        limit = 1

    x_TD = torch.randn(9, 4)
    for router in (Renamed(4, 6), TopKRouter(4, 6, 2)):
        assert router.choose_natively(router.score(x_TD)) is not None
        router.to(torch.bfloat16)
        assert router.choose_natively(router.score(x_TD.bfloat16())) is not None  # scores are fp32
    for router in (Half(4, 6), Few(4, 6, 2), One(4, 6)):
        assert router.choose_natively(router.score(x_TD)) is None
    assert Few(4, 6, 2)(x_TD).token_R.numel() == 10 and One(4, 6)(x_TD).token_R.numel() == 9


def test_what_stands_in_the_place_of_rows_in_order_is_sorted() -> None:
    layer, x_TD = MoELayer(4, 3, 6, TopKRouter(4, 6, 2)), torch.randn(9, 4)
    routing = layer.router(x_TD)
    turned = replace(routing, expert_R=5 - routing.expert_R)
    assert turned.counts_in_order is None
    assert torch.equal(turned.rows_per_expert(), routing.rows_per_expert().flip(0))
    rows = ExpertRows.of(turned)
    assert torch.equal(rows.counts_E, turned.rows_per_expert())
    order_R = torch.argsort(turned.expert_R, stable=True)
    assert torch.equal(rows.source_R, turned.token_R[order_R])


def test_nan_is_an_error_as_before() -> None:
    x_TD = torch.randn(3, 4)
    x_TD[1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="router input holds NaN or inf in 1 of 3 tokens"):
        ThresholdRouter(4, 6)(x_TD)


@pytest.mark.parametrize("t, taken", [(0.0, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_a_mass_that_is_exactly_t_is_enough(t: float, taken: int) -> None:
    chosen = choose_experts(torch.zeros(3, 4), 4, t)  # each has 1/4
    assert chosen.rank_R.bincount().tolist() == [3] * taken
    assert chosen.expert_R.tolist() == [expert for expert in range(taken) for _ in range(3)]  # the lower id


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"k": 2}], ids=str)
def test_where_plain_is_asked_for_routers_are_plain_too(options: dict[str, float]) -> None:
    router, logits_TE = router_of(4, **options), scores(9, 4)
    assert router.choose_natively(logits_TE) is not None
    with use_kernel("plain"):
        assert router.choose_natively(logits_TE) is None


@pytest.mark.parametrize("options", [{"threshold": 0.6}, {"k": 3}], ids=str)
def test_a_bias_orders_experts_here_too(options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    router, logits_TE = router_of(16, **options), scores(200, 16).requires_grad_()
    router.balance_by("bias")
    router.balancing.bias_E.copy_(torch.randn(16))
    chosen = router.chosen(logits_TE)
    assert chosen.counts_E is not None
    monkeypatch.setattr(router, "choose_natively", lambda _: None)
    plain = router.chosen(logits_TE)
    assert_same_rows(chosen, plain)
    ours, theirs = (torch.autograd.grad(c.weight_R.square().sum(), logits_TE)[0] for c in (chosen, plain))
    assert_same(ours, theirs)
