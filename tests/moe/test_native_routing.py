"""The choice of experts in C++ is the plain routers' choice."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_same
from torch import Tensor

from xmoe_fairseq.moe import ThresholdRouter, TopKRouter
from xmoe_fairseq.moe.native import missing
from xmoe_fairseq.moe.native.routing import Chosen, choose_experts
from xmoe_fairseq.moe.routing import Routing, count


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    assert missing() == ""


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def router_of(num_experts: int, **options: float) -> ThresholdRouter | TopKRouter:
    """Whose scores are its input."""
    kind = TopKRouter if "k" in options else ThresholdRouter
    router = kind(num_experts, num_experts, **options).double()
    router.weight.data = torch.eye(num_experts, dtype=torch.float64)
    return router


def assert_same_rows(chosen: Chosen, routing: Routing) -> None:
    order_R = torch.argsort(routing.expert_R, stable=True)
    for name in ("token_R", "expert_R", "rank_R"):
        assert torch.equal(getattr(chosen, name), getattr(routing, name)[order_R]), name
    assert torch.equal(chosen.weight_R, routing.weight_R[order_R])
    assert torch.equal(chosen.probs_TE, routing.probs_TE)
    assert torch.equal(chosen.counts_E, routing.rows_per_expert())
    assert torch.equal(chosen.first_T, routing.probs_TE.argmax(dim=1))


def scores(tokens: int, num_experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """With ties: of whole numbers and halves."""
    return (torch.randn(tokens, num_experts) * 4).round().to(dtype) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_experts", [1, 7, 64, 600])
@pytest.mark.parametrize("options", [{"threshold": t} for t in (0, 0.3, 0.9, 1)] + [{"k": 1}], ids=str)
def test_equals_the_plain_routers(
    options: dict[str, float], num_experts: int, dtype: torch.dtype, threads: int
) -> None:
    logits_TE = scores(300, num_experts, dtype)
    routing = router_of(num_experts, **options).to(dtype)(logits_TE)
    chosen = choose_experts(logits_TE, options.get("k", num_experts), options.get("threshold", 1.0))
    assert_same_rows(chosen, routing)


@given(data=st.data())
def test_any_limit_and_threshold(data: st.DataObject) -> None:
    tokens, num_experts = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
    limit, threshold = data.draw(st.integers(1, num_experts)), data.draw(st.floats(0, 1))
    logits_TE = scores(tokens, num_experts)
    router = router_of(num_experts, threshold=threshold, max_experts_per_token=limit)
    routing = router(logits_TE)
    chosen = choose_experts(logits_TE, limit, threshold)
    assert chosen.rank_R.numel() == 0 or chosen.rank_R.max() < limit
    if tokens:
        assert_same_rows(chosen, routing)
    else:
        assert chosen.counts_E.tolist() == [0] * num_experts and chosen.token_R.numel() == 0


@pytest.mark.parametrize("limit", [0, 3])
def test_counts_for_a_budget(limit: int, threads: int) -> None:
    options = {"max_experts_per_token": limit, "target_experts_per_token": 2}
    router, logits_TE = router_of(32, **options).float(), scores(900, 32, torch.float32)
    router.train()
    routing = router(logits_TE)
    expected_C = router.budget.pop_counts()
    counts_C = torch.zeros_like(expected_C)
    for times in (1, 2):  # they add up
        chosen = choose_experts(logits_TE, limit or 32, router.budget.threshold.item(), counts_C)
        assert torch.equal(counts_C, times * expected_C)
    assert_same_rows(chosen, routing)


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


def test_nan_takes_each_expert_once_at_most() -> None:
    """In training in fp16 it goes on to the loss scaler."""
    logits_TE = torch.randn(3, 8)
    logits_TE[1, 2] = torch.nan
    for threshold in (0.5, 1.0):
        chosen = choose_experts(logits_TE, 8, threshold, torch.zeros(1026, dtype=torch.long))
        pair_R = chosen.token_R * 8 + chosen.expert_R
        assert pair_R.unique().numel() == pair_R.numel()
        assert torch.equal(chosen.counts_E, count(chosen.expert_R, 8))
        assert chosen.weight_R[chosen.token_R == 1].isnan().all()
