"""Experts that come and go: by hand and token by token, who is counted, what a checkpoint holds."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import choose_any
from tolerances import about, assert_same
from torch import Tensor, nn

from xmoe_fairseq.moe import MoELayer, RoutingStats, TopAnyRouter, step_expert_pools
from xmoe_fairseq.moe.steered import MANY

# Of the axes' experts with thresholds of 0.5: both of 0 and 1; 0; none, and 2 is the best of all.
BOTH, FIRST, NONE = (
    torch.tensor([3.0, 4.0, 0.0]),
    torch.tensor([5.0, 0.0, 0.0]),
    torch.tensor([-3.0, -4.0, 0]),
)


def axes(every: int = 2, initial: int = 0) -> TopAnyRouter:
    """Three experts along the axes, so the scores are the normalised input."""
    router = TopAnyRouter(3, 3, adapt_experts_every=every, initial_experts=initial)
    router.weight.data = torch.eye(3) * 7
    router.threshold_E.data.fill_(0.5)
    return router


def update(router: nn.Module, *batches: Tensor) -> None:
    """Of several micro-batches."""
    for x_TD in batches:
        router(x_TD)
    step_expert_pools(router)


def in_use(router: TopAnyRouter) -> list[int]:
    return router.pool.active_E.nonzero().flatten().tolist()


def test_an_expert_comes_for_tokens_that_pass_nowhere() -> None:
    router = axes(initial=2)
    update(router, torch.stack([BOTH, NONE]))  # scores -0.6, -0.8 of those in use: the first is better
    routing = router.eval()(NONE.unsqueeze(0))
    assert in_use(router) == [0, 1] and routing.expert_R.tolist() == [0]
    update(router.train(), torch.stack([2 * NONE]), torch.stack([FIRST]))
    assert in_use(router) == [0, 1, 2]
    assert_same(router.weight.data, torch.tensor([[7.0, 0, 0], [0, 7, 0], [-0.6, -0.8, 0]]))
    assert router.threshold_E.tolist() == [0.5, 0.5, 0.0]
    assert router.eval()(NONE.unsqueeze(0)).expert_R.tolist() == [2]
    update(router.train(), torch.stack([BOTH]))  # what was recorded is forgotten
    update(router, torch.stack([BOTH]))
    assert in_use(router) == [0, 1]


def test_one_that_went_makes_room_for_one_that_comes() -> None:
    layer = MoELayer(3, 4, 3, axes())
    router, experts = layer.router, copy.deepcopy(layer.experts.state_dict())
    layer(torch.stack([FIRST, FIRST, torch.tensor([0.0, -1.0, -2.0])]))  # the last has its best one, 0
    update(router, torch.empty(0, 3))
    assert in_use(router) == [0, 1, 2]
    update(router, torch.stack([FIRST]))
    assert in_use(router) == [0, 1]
    assert_same(router.weight.data[1], torch.tensor([0.0, -1.0, -2.0]) / 5**0.5)
    assert router.threshold_E.tolist() == [0.5, 0.0, 0.5]
    assert all(torch.equal(value, experts[name]) for name, value in layer.experts.state_dict().items())


def test_nothing_moves_without_tokens_that_count() -> None:
    router = axes(every=1, initial=2)
    before = copy.deepcopy(router.state_dict())
    update(router.eval(), torch.stack([NONE]))
    router.train().counting = False
    update(router, torch.stack([NONE]))
    router.counting = True
    update(router, torch.empty(0, 3))
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    update(router, torch.stack([NONE]))  # which is computed by 0
    assert in_use(router) == [0, 1] and router.weight[1].tolist() == pytest.approx([-0.6, -0.8, 0])


def test_with_all_in_use_none_comes_and_without_checks_none_goes() -> None:
    full = axes(every=1)
    before = full.weight.clone()
    update(full, torch.stack([FIRST, torch.tensor([0.0, 5, 0]), torch.tensor([0, 0, 5.0]), NONE]))
    assert in_use(full) == [0, 1, 2] and torch.equal(full.weight, before)
    fixed = axes(every=0)
    update(fixed, torch.stack([FIRST]))
    assert in_use(fixed) == [0, 1, 2] and "active_experts" not in fixed.to_log()


def test_tokens_that_have_overflowed_are_no_direction() -> None:
    """Scores of NaN come with --fp16; its loss scaler skips the update."""
    router = axes(every=1, initial=2)
    bad = torch.tensor([float("nan"), 1.0, float("inf")])
    router.pool.count(torch.tensor([1, 1, 0]), torch.stack([NONE, bad]), torch.tensor([True, True]))
    step_expert_pools(router)
    assert router.weight.isfinite().all() and in_use(router) == [0, 1, 2]


@given(
    initial=st.integers(1, 6),
    limit=st.integers(0, 3),
    sizes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=5),
    every=st.integers(1, 3),
    threshold=st.sampled_from([-0.3, 0.3, 0.6]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_token_by_token(
    initial: int, limit: int, sizes: list[list[int]], every: int, threshold: float, seed: int
) -> None:
    torch.manual_seed(seed)
    router = TopAnyRouter(4, 6, limit, every, initial)
    router.threshold_E.data.fill_(threshold)
    got: set[int] = set()
    unserved, updates = torch.zeros(4), 0
    for parts in sizes:
        batches = [torch.randn(size, 4) for size in parts]
        for x_D in torch.cat(batches):
            chosen, _, margin = choose_any(router, x_D)
            assume(margin > 1e-5)
            got |= set(chosen)
            score = router.weight.detach()[chosen[0]] @ x_D / router.weight[chosen[0]].norm() / x_D.norm()
            if torch.sigmoid(score) <= torch.sigmoid(router.threshold_E[chosen[0]]):
                unserved = unserved + x_D
        expected, weight = set(in_use(router)), router.weight.detach().clone()
        updates += any(parts)
        if any(parts) and updates % every == 0:
            expected &= got
            idle = sorted(set(range(6)) - expected)
            if idle and unserved.any():
                expected.add(idle[0])
                weight[idle[0]] = unserved / unserved.norm()
            got, unserved = set(), torch.zeros(4)
        update(router, *batches)
        assert in_use(router) == sorted(expected) and expected
        assert_same(router.weight.data, weight)


def test_an_expert_that_is_not_in_use_computes_and_learns_nothing() -> None:
    layer, x_TD = MoELayer(3, 4, 3, axes(initial=2)), torch.randn(50, 3, requires_grad=True)
    y_TD, routing = layer(x_TD)
    (y_TD.square().sum() + routing.load_balance_loss).backward()
    assert routing.rows_per_expert()[2] == 0 and not routing.probs_TE[:, 2].any()
    assert not layer.router.weight.grad[2].any() and not layer.router.threshold_E.grad[2]
    assert not layer.experts.fc1_weight.grad[2].any() and layer.router.weight.grad[:2].all()
    assert layer.router.to_log()["active_experts"] == 2


def test_loads_are_of_the_experts_in_use() -> None:
    router = axes(initial=2)
    even = RoutingStats.of(router(torch.stack([BOTH, BOTH])))
    assert (even.dead_experts, even.load_cv, even.max_violation) == (0, 0, 0)
    assert even.load_balance_loss.item() == about(2 * even.probs_E[1].item() / 2)  # it is all first choices
    router.pool.active_E.fill_(True)
    one = RoutingStats.of(router(torch.stack([FIRST, FIRST])))
    assert one.dead_experts == 2 and one.max_violation.item() == about(2.0)
    assert (even + one).dead_E.tolist() == [False, False, True]


def test_a_state_goes_through_a_state_dict_and_half_precision() -> None:
    router = axes(initial=2)
    update(router, torch.stack([BOTH, NONE, NONE]))
    state = router.state_dict()
    assert state["pool.tokens_E"].tolist() == [3, 1, 0] and state["pool.unserved_D"].tolist() == [-6, -8, 0]
    half = copy.deepcopy(router).half()
    assert all(torch.equal(half.state_dict()[name], state[name]) for name in state if "pool" in name)
    again = axes(initial=2)
    again.load_state_dict(state)
    update(again, torch.stack([FIRST]))
    update(router, torch.stack([FIRST]))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in router.state_dict().items())
    old = {name: value for name, value in state.items() if "pool" not in name}  # of an earlier version
    axes(initial=2).load_state_dict(old)
    fixed = axes(every=0)  # trained on without checks, or only used
    fixed.load_state_dict(router.state_dict())
    assert in_use(fixed) == in_use(router)


def states(batches: list[list[Tensor]]) -> Tensor:
    """After each update of several micro-batches."""
    torch.manual_seed(3)
    model = nn.ModuleList([TopAnyRouter(16, 12, 2, every, 4) for every in (1, 2)])
    for router in model:
        router.threshold_E.data.fill_(0.2)
    found = []
    for parts in batches:
        for x_TD in parts:
            for router in model:
                router(x_TD)
        step_expert_pools(model)
        found += [value.detach().double().flatten() for value in copy.deepcopy(model.state_dict()).values()]
    return torch.cat(found)


def test_ranks_and_micro_batches_go_as_one_batch() -> None:
    sizes = [(30, 7), (0, 5), (12, 12), (9, 0)]  # tokens of each rank; one has none
    parts = [[torch.randn(size, 16) for size in pair] for pair in sizes]

    def rank() -> Tensor:
        return states([[pair[dist.get_rank()]] for pair in parts])

    together = states([[torch.cat(pair)] for pair in parts])
    assert_same(states(parts), together, dtype=torch.float32)
    first, second = run_ranks(2, rank)
    assert torch.equal(first, second)
    assert_same(first, together, dtype=torch.float32)


def test_a_loop_that_never_steps_is_told_so() -> None:
    router = axes()
    with pytest.warns(UserWarning, match=r"adapt_experts_every=2: .*call xmoe_fairseq.moe.step_expert_pools"):
        for _ in range(MANY):
            router(torch.stack([FIRST]))


@pytest.mark.parametrize(
    "pool, message",
    [
        ((-1, 0), r"adapt_experts_every must be 0 \(never\) or a whole number, got -1"),
        ((2, 4), "initial_experts must be from 1 to num_experts = 3, .*, got 4"),
        ((0, 2), "initial_experts must be from 1 to .*, and so many unless some may be added, got 2"),
    ],
)
def test_what_it_cannot_be_is_refused(pool: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        axes(*pool)
