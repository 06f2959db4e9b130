"""What keeps experts evenly used: values by hand, what is counted, who counts, what a checkpoint holds."""

import copy
from functools import partial
from math import exp

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tolerances import about, assert_same
from torch import Tensor, nn

from xmoe_fairseq.moe import MoELayer, Router, ThresholdRouter, TopKRouter, step_balance, step_budgets
from xmoe_fairseq.moe.balance import BALANCES, STEP, AllChoices
from xmoe_fairseq.moe.steered import MANY

# Probabilities of three tokens, which take two experts each: 0 and 1; 0 and 1; 2 and 0.
PROBS = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.3, 0.1, 0.6]])


def router_of(balance: str, num_experts: int = 3, k: int = 2, step: float = STEP) -> TopKRouter:
    """Whose scores are its input."""
    router = TopKRouter(num_experts, num_experts, k)
    router.weight.data = torch.eye(num_experts)
    router.balance_by(balance, step)
    return router


def test_losses_by_hand() -> None:
    """Mean probabilities are 14/30, 7/30, 9/30; first choices 2, 0, 1 of 3; all choices 3, 2, 1 of 6."""
    logits_TE = PROBS.log()
    of = {balance: router_of(balance)(logits_TE).load_balance_loss.item() for balance in BALANCES}
    assert of["first"] == about(3 * (14 / 30 * 2 / 3 + 9 / 30 * 1 / 3))
    assert of["all"] == about(3 * (14 / 30 * 3 / 6 + 7 / 30 * 2 / 6 + 9 / 30 * 1 / 6))
    assert of["global"] == about(1.0)  # nothing is known as yet
    assert of["bias"] == of["none"] == 0
    router = router_of("global")
    router(torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.2, 0.7]]).log())  # another micro-batch
    router(logits_TE)
    step_balance(router)  # all choices 4 (0 with 1 of equals), 4, 2 of 10
    assert_same(router.balancing.share_E, torch.tensor([4, 4, 2]) / 10)
    expected = 3 * (14 / 30 * 0.4 + 7 / 30 * 0.4 + 9 / 30 * 0.2)
    assert router(logits_TE).load_balance_loss.item() == about(expected)


def test_shares_are_as_precise_as_probabilities() -> None:
    probs_TE, rows_E = torch.rand(9, 3, dtype=torch.float64), torch.tensor([1, 1, 1])
    loss = AllChoices().loss(probs_TE, rows_E)
    assert abs(loss - probs_TE.mean(0).sum()) < 1e-14  # 3 times a third, of which fp32 has fewer digits


def test_bias_by_hand() -> None:
    """Rows 3, 2, 1 of mean 2: one is lowered by u, one raised, their mean is 0 already."""
    router = router_of("bias")
    router(PROBS.log())
    step_balance(router)
    assert_same(router.balancing.bias_E, STEP * torch.tensor([-1.0, 0.0, 1.0]))
    router(PROBS.log()[:2])  # rows 2, 2, 0: the mean of d is -u / 3
    step_balance(router)
    assert_same(router.balancing.bias_E, STEP / 3 * torch.tensor([-5.0, -2.0, 7.0]))
    assert router.balancing.bias_E.dtype == torch.float32


def test_a_bias_changes_who_is_chosen_and_not_how_much_it_counts() -> None:
    """Of three experts that are nearly alike the last one gets a bias of 1: e times as probable."""
    logits_TE = torch.tensor([[0.2, 0.1, 0.0]], requires_grad=True)
    probs = torch.softmax(logits_TE.detach(), dim=1)[0]
    router = router_of("bias", k=1)
    router.balancing.bias_E.copy_(torch.tensor([0.0, 0.0, 1.0]))
    routing = router(logits_TE)
    assert routing.expert_R.tolist() == [2]
    assert_same(routing.weight_R.detach(), probs[2:])
    assert_same(routing.probs_TE.detach()[0], probs)
    (grad_TE,) = torch.autograd.grad(routing.weight_R.sum(), logits_TE)
    assert_same(grad_TE[0], probs[2] * (torch.tensor([0.0, 0.0, 1.0]) - probs))
    threshold = ThresholdRouter(3, 3, 0.5)  # by softmax(z + b) the last has 0.56, by softmax(z) 0.30
    threshold.weight.data = torch.eye(3)
    assert threshold(logits_TE).expert_R.tolist() == [0, 1]
    threshold.balance_by("bias")
    threshold.balancing.bias_E.copy_(torch.tensor([0.0, 0.0, 1.0]))
    assert threshold(logits_TE).expert_R.tolist() == [2]
    mass = exp(1) / (exp(1) + exp(0.1) + exp(0.2))
    threshold.fix(mass + 0.01)
    assert sorted(threshold(logits_TE).expert_R.tolist()) == [0, 2]


def test_a_budget_counts_with_the_bias() -> None:
    router = ThresholdRouter(8, 8, target_experts_per_token=2.0)
    router.balance_by("bias")
    router.balancing.bias_E.copy_(torch.linspace(-2, 2, 8))
    x_TD = torch.randn(500, 8)
    router(x_TD)
    step_budgets(router)
    assert router.eval()(x_TD).experts_per_token == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("step, updates", [(STEP, 150), (10 * STEP, 15)])
def test_a_bias_evens_out_a_router_that_prefers_some_experts(step: float, updates: int) -> None:
    torch.manual_seed(0)
    router, drawn = router_of("bias", 8, step=step), torch.linspace(0, 0.2, 8)

    def rows() -> Tensor:
        return router(torch.randn(400, 8) * 0.1 + drawn).rows_per_expert()

    before = rows()
    for _ in range(updates):
        step_balance(router)
        rows()
    assert before.max() > 1.7 * before.float().mean()
    assert rows().max() < 1.3 * before.float().mean()


@pytest.mark.parametrize("balance", ["global", "bias"])
def test_evaluation_and_batches_that_do_not_count_move_nothing(balance: str) -> None:
    router = router_of(balance)
    (before,) = [buffer.clone() for buffer in router.buffers()]
    router.eval()(PROBS.log())
    router.train().counting = False
    router(PROBS.log())
    router.counting = True
    router(torch.empty(0, 3))
    step_balance(router)
    assert torch.equal(next(router.buffers()), before)
    router(PROBS.log())
    step_balance(router)
    assert not torch.equal(next(router.buffers()), before)


@pytest.mark.parametrize("balance", BALANCES)
def test_a_state_keeps_its_precision_and_goes_through_a_state_dict(balance: str) -> None:
    router = router_of(balance)
    router(PROBS.log())
    step_balance(router)
    names = {"global": ["balancing.share_E"], "bias": ["balancing.bias_E"]}.get(balance, [])
    assert list(router.state_dict()) == ["weight", *names]
    half = copy.deepcopy(router).half()
    assert all(torch.equal(half.state_dict()[name], router.state_dict()[name]) for name in names)
    assert all(half.state_dict()[name].dtype == torch.float32 for name in names)
    again = router_of(balance)
    again.load_state_dict(router.state_dict())
    assert all(torch.equal(again.state_dict()[name], router.state_dict()[name]) for name in names)
    again.load_state_dict(router_of("first").state_dict())  # of a model that was balanced otherwise
    plain = router_of("first")
    if balance == "bias":  # without it tokens would choose otherwise
        with pytest.raises(RuntimeError, match="Unexpected key.*balancing.bias_E"):
            plain.load_state_dict(router.state_dict())
    else:
        plain.load_state_dict(router.state_dict())


def test_a_loop_that_never_steps_is_told_so() -> None:
    router = router_of("bias")
    with pytest.warns(UserWarning, match=r"balance=bias: .*call xmoe_fairseq.moe.step_balance\(model\)"):
        for _ in range(MANY):
            router(PROBS.log())


def test_an_unknown_balance_is_refused() -> None:
    with pytest.raises(ValueError, match="balance must be one of first, all, global, bias, none, got even"):
        router_of("even")


@pytest.mark.parametrize("step", [0.0, -0.1, float("nan")])
def test_a_step_that_goes_nowhere_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match=f"step must be above 0, got {step}"):
        router_of("bias", step=step)


def test_own_losses_of_a_subclass_are_those_of_first() -> None:
    class Own(TopKRouter):
        def balance(self, probs_TE: Tensor, first_choice_T: Tensor) -> Tensor:
            return probs_TE.sum() * 7

    router = Own(3, 3, 1)
    assert router(PROBS).load_balance_loss.item() == about(21.0)
    router.balance_by("none")
    assert router(PROBS).load_balance_loss.item() == 0


def layers(balance: str) -> nn.ModuleList:
    torch.manual_seed(3)
    routers: list[Router] = [TopKRouter(16, 12, 3), ThresholdRouter(16, 12, 0.6, 4)]
    for router in routers:
        router.balance_by(balance)
    return nn.ModuleList([MoELayer(16, 4, 12, router) for router in routers])


def states(balance: str, batches: list[list[Tensor]]) -> Tensor:
    """After each update, and the gradients of the last one's losses; an update has several micro-batches."""
    model, found = layers(balance), []
    for micro_batches in batches:
        model.zero_grad()
        for x_TD in micro_batches:
            for layer in model:
                (layer(x_TD)[1].load_balance_loss * len(x_TD)).backward()
        step_balance(model)
        found += [buffer.clone() for buffer in model.buffers()]
    grads = [layer.router.weight.grad for layer in model]
    if dist.is_initialized():
        for grad in grads:
            dist.all_reduce(grad)
    return torch.cat([part.flatten() for part in [*found, *grads]])


@pytest.mark.parametrize("balance", ["global", "bias"])
def test_ranks_and_micro_batches_go_as_one_batch(balance: str) -> None:
    sizes = [(30, 7), (0, 5), (12, 12)]  # tokens of each rank; one has none
    parts = [[torch.randn(size, 16) for size in pair] for pair in sizes]

    def rank() -> Tensor:
        return states(balance, [[pair[dist.get_rank()]] for pair in parts])

    together = states(balance, [[torch.cat(pair)] for pair in parts])
    assert together.count_nonzero() > 0
    moved = 3 * 24  # of two layers after three updates: whole numbers have been counted
    for other in (states(balance, parts), *run_ranks(2, rank)):
        assert torch.equal(other[:moved], together[:moved])
        assert_same(other[moved:], together[moved:], terms=100)


def test_one_batch_in_many_parts_has_the_same_gradient_by_global_only() -> None:
    """Sentences that keep to few experts each: evenly used by all together, as all experts should be."""
    x_TD = torch.cat([torch.randn(8, 16) * 0.3 + torch.randn(16) for _ in range(16)])

    def gradient(balance: str, parts: int) -> Tensor:
        model = layers(balance)
        for _ in range(2):  # the first makes the shares known
            model.zero_grad()
            for part_TD in x_TD.chunk(parts):
                (model[0](part_TD)[1].load_balance_loss / parts).backward()
            step_balance(model)
        return model[0].router.weight.grad.flatten()

    cosine = partial(torch.cosine_similarity, dim=0)
    assert cosine(gradient("all", 16), gradient("all", 1)) < 0.98
    assert_same(gradient("global", 16), gradient("global", 1), terms=100)
    assert cosine(gradient("global", 16), gradient("all", 1)) > 0.99  # the same tokens twice
