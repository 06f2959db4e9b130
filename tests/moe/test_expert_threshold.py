"""Expert thresholds: values by hand and of the authors' code, who is counted, what a checkpoint holds."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tolerances import assert_same
from torch import Tensor, nn
from torch.testing import assert_close

from xmoe_fairseq.moe import ExpertThresholdRouter, MoELayer, step_expert_thresholds
from xmoe_fairseq.moe.budget import BINS
from xmoe_fairseq.moe.steered import MANY

DECAY = 0.99


def router_of(num_experts: int = 4, k: float = 1.0, expert_choice_updates: int = 0) -> ExpertThresholdRouter:
    """Whose scores are its input."""
    router = ExpertThresholdRouter(num_experts, num_experts, k, expert_choice_updates, DECAY)
    router.weight.data = torch.eye(num_experts)
    return router


def update(router: nn.Module, *batches: Tensor) -> list[list[int]]:
    """Rows of each expert in each micro-batch."""
    rows = [router(x_TD).rows_per_expert().tolist() for x_TD in batches]
    step_expert_thresholds(router)
    return rows


def scores(number: int) -> Tensor:
    """(400, 4) of a batch."""
    t, e = torch.arange(1, 401, dtype=torch.float64).unsqueeze(1), torch.arange(1, 5, dtype=torch.float64)
    z_TE = 2 * torch.sin(0.7 * t * e + number) + torch.cos(0.01 * t * t * e) + 0.3 * e * (1 + number / 4)
    return z_TE.float()


def test_by_hand() -> None:
    """The best quarter of four tokens, and of eight; a token takes what passes, or nothing."""
    router = router_of(2, 0.5)
    x_TD = torch.tensor([[3.0, -1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 3.0]])
    router(x_TD)
    step_expert_thresholds(router)
    assert ((router.thresholds.threshold_E > 1) & (router.thresholds.threshold_E <= 3)).all()
    routing = router.eval()(x_TD)
    assert routing.combine_weights().bool().tolist() == [
        [True, False],
        [False] * 2,
        [False] * 2,
        [False, True],
    ]
    assert_same(routing.weight_R, torch.sigmoid(torch.tensor([3.0, 3.0])))
    assert routing.load_balance_loss == 0
    both = router(torch.tensor([[4.0, 5.0]]))
    assert both.expert_R[both.rank_R.argsort()].tolist() == [1, 0]  # in order of preference


@pytest.mark.parametrize("expert_choice_updates", [0, 2])
def test_the_authors_numbers(expert_choice_updates: int) -> None:
    """Their bias-corrected cutoffs (decay 0.99) after each of four updates; theirs is the k-th largest
    score itself, ours lies between it and the next one. The first two updates are by expert choice there, the
    others by the cutoffs of before."""
    cutoffs = torch.tensor(
        [
            [1.5882, 1.9094, 2.2675, 2.4998],
            [1.6622, 1.9578, 2.3862, 2.6473],
            [1.7085, 2.0216, 2.4721, 2.8006],
            [1.7419, 2.0932, 2.5797, 2.9451],
        ]
    )
    rows = [[100] * 4, [100] * 4, [106, 113, 123, 144], [107, 126, 139, 148]]
    router = router_of(expert_choice_updates=expert_choice_updates)
    for number, (cutoff_E, rows_E) in enumerate(zip(cutoffs, rows, strict=True)):
        (taken,) = update(router, scores(number))
        if expert_choice_updates or number > 1:
            assert taken == pytest.approx(rows_E, abs=0 if number < 2 else 5)
        assert_close(router.thresholds.threshold_E, cutoff_E, rtol=0, atol=0.04)
    assert router.eval()(scores(9)).rows_per_expert().tolist() == pytest.approx([141, 187, 221, 273], abs=5)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("num_experts, k", [(4, 1.0), (32, 2.5), (8, 8.0), (3, 0.1)])
def test_the_first_step_gives_every_expert_its_share(num_experts: int, k: float, spread: float) -> None:
    router, x_TD = router_of(num_experts, k), spread * torch.randn(2000, num_experts)
    update(router, *x_TD.split(700))  # micro-batches
    taken_E = router.eval()(x_TD).rows_per_expert().double()
    assert_close(
        taken_E, torch.full_like(taken_E, 2000 * k / num_experts), rtol=0.02, atol=8
    )  # a bin's tokens


def test_before_the_first_update_normal_tokens_take_about_k() -> None:
    router = ExpertThresholdRouter(64, 16, 3.0)
    for factor in (1.0, 5.0):
        router.weight.data.mul_(factor)
        router.temperature = factor / 2
        x_TD = nn.functional.layer_norm(torch.randn(4000, 64), (64,))
        assert router(x_TD).experts_per_token == pytest.approx(3.0, rel=0.05)


def test_the_average_is_of_all_updates_and_later_ones_count_more() -> None:
    router = router_of(1, 0.5)
    for score in (0.0, 1.0, 1.0):
        update(router, torch.tensor([[score]]).repeat(100, 1))
    expected = torch.tensor([(DECAY + 1) / (1 + DECAY + DECAY**2)])
    assert_close(router.thresholds.threshold_E, expected, rtol=0, atol=8 / BINS)  # a bin at score 1
    assert router.thresholds.updates == 3


def test_expert_choice_ends_after_its_updates_and_never_reaches_evaluation() -> None:
    router, x_TD = router_of(4, 1.0, expert_choice_updates=2), torch.randn(40, 4)
    even = [10] * 4
    assert update(router, x_TD) == [even]
    shifted_TD = x_TD + torch.tensor([5.0, 0.0, 0.0, -5.0])
    assert update(router, shifted_TD) == [even]
    assert router(shifted_TD).rows_per_expert().tolist() != even
    untrained = router_of(4, 1.0, expert_choice_updates=2)
    assert untrained.eval()(shifted_TD).rows_per_expert()[0] > 35
    x_TD[7] += 9  # a later token: in training it displaces others, in evaluation none
    taken = [untrained.train(mode)(x_TD).combine_weights()[:7].bool() for mode in (True, False)]
    before = [untrained.train(mode)(x_TD[:7]).combine_weights().bool() for mode in (True, False)]
    assert torch.equal(taken[1], before[1]) and not torch.equal(taken[0], before[0])


def test_evaluation_and_batches_that_do_not_count_move_nothing() -> None:
    router = router_of()
    update(router.eval(), scores(0))
    router.train().counting = False
    update(router, scores(0))
    router.counting = True
    update(router, torch.empty(0, 4))
    assert router.thresholds.updates == 0 and not router.thresholds.threshold_E.any()
    update(router, scores(0))
    assert router.thresholds.updates == 1 and router.thresholds.threshold_E.all()


def test_a_state_keeps_its_precision_and_goes_through_a_state_dict() -> None:
    router = router_of()
    update(router, scores(0))
    saved = router.state_dict()
    assert list(saved) == ["weight", "thresholds.threshold_E", "thresholds.updates"]
    half, again = copy.deepcopy(router).half(), router_of()
    again.load_state_dict(saved)
    for other in (half, again):
        assert torch.equal(other.thresholds.threshold_E, router.thresholds.threshold_E)
        assert other.thresholds.updates == 1
    update(router, scores(1))
    update(again, scores(1))
    assert torch.equal(again.thresholds.threshold_E, router.thresholds.threshold_E)


def test_an_overflow_on_its_way_to_the_loss_scaler_is_counted_and_taken_by_nobody() -> None:
    router, x_TD = router_of().half(), scores(0).half()
    x_TD[3] = float("inf")
    assert 3 not in router(x_TD).token_R
    step_expert_thresholds(router)
    assert router.thresholds.threshold_E.isfinite().all()


def test_a_loop_that_never_steps_is_told_so() -> None:
    router = router_of()
    with pytest.warns(UserWarning, match=r"call xmoe_fairseq.moe.step_expert_thresholds\(model\) after each"):
        for _ in range(MANY):
            router(torch.randn(5, 4))


@pytest.mark.parametrize(
    "k, updates, decay, message",
    [
        (0, 0, 0, r"experts_per_token must be in \(0, num_experts = 4\], got 0"),
        (5, 0, 0, r"experts_per_token must be in \(0, num_experts = 4\], got 5"),
        (1, 0, 1, r"decay must be in \[0, 1\), got 1"),
        (1, -1, 0, "expert_choice_updates must be 0 or more, got -1"),
    ],
)
def test_bad_arguments_get_one_clear_line(k: float, updates: int, decay: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertThresholdRouter(4, 4, k, updates, decay)


@pytest.mark.parametrize("expert_choice_updates", [0, 1])
def test_ranks_and_micro_batches_go_as_one(expert_choice_updates: int) -> None:
    parts = [[torch.randn(size, 16) for size in pair] for pair in [(30, 7), (0, 5), (12, 12)]]

    def states(batches: list[list[Tensor]]) -> Tensor:
        torch.manual_seed(3)
        routers = [ExpertThresholdRouter(16, 12, 3, expert_choice_updates) for _ in range(2)]
        model, found = nn.ModuleList([MoELayer(16, 4, 12, router) for router in routers]), []
        for micro_batches in batches:
            for x_TD in micro_batches:
                for layer in model:
                    layer(x_TD)
            step_expert_thresholds(model)
            found += [layer.router.thresholds.threshold_E.clone() for layer in model]
        return torch.cat(found)

    def rank() -> Tensor:
        return states([[pair[dist.get_rank()]] for pair in parts])

    together = states([[torch.cat(pair)] for pair in parts])
    for other in (states(parts), *run_ranks(2, rank)):
        assert torch.equal(other, together)
