"""ReMoE's router: its authors' numbers, how its loss is weighed and steered, tokens that no expert takes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tolerances import about, assert_same
from torch import Tensor, nn

from xmoe_fairseq.moe import MoELayer, ReLURouter, RoutingStats, step_sparsity, use_kernel
from xmoe_fairseq.moe.routers.relu import START
from xmoe_fairseq.moe.steered import MANY

GOLDEN = Path(__file__).parents[1] / "golden" / "router_relu.npz"


def router_of(num_experts: int = 3, k: float = 1.0) -> ReLURouter:
    """Whose scores are its input."""
    router = ReLURouter(num_experts, num_experts, k)
    router.weight.data = torch.eye(num_experts)
    return router


def test_the_authors_numbers() -> None:
    arrays = {name: torch.tensor(array) for name, array in np.load(GOLDEN).items()}
    router = ReLURouter(6, 4, 1.0)
    router.weight.data = arrays["router_weight"]
    router.sparsity.l1_coeff.copy_(arrays["l1_coeff"])
    x_TD = arrays["x"].requires_grad_()
    routing = router(x_TD)
    assert_same(routing.combine_weights(), arrays["combine_weights"])
    assert_same(routing.load_balance_loss, arrays["l1_loss"])
    assert 1 - routing.experts_per_token / 4 == about(arrays["sparsity"][0])
    ((routing.combine_weights() * arrays["grad_output"]).sum() + routing.load_balance_loss).backward()
    assert_same(router.weight.grad, arrays["grad_router_weight"])
    assert_same(x_TD.grad, arrays["grad_x"])


def test_a_loss_by_hand() -> None:
    """Four tokens: expert 0 takes two with 0.5 and 0.1, expert 1 one with 0.2, expert 2 none; k is 1.5."""
    router = router_of(k=1.5)
    routing = router(torch.tensor([[0.5, 0.2, -1.0], [0.1, -3.0, 0.0], [-1.0, -1.0, -1.0], [0.0, -0.1, 0.0]]))
    assert routing.expert_R.tolist() == [0, 0, 1] and routing.token_R.tolist() == [0, 1, 0]
    loss = START * 3 / (1.5 * 4) * (2 * (0.5 + 0.1) + 1 * 0.2) / 4
    assert routing.load_balance_loss.item() == about(loss)
    assert routing.loss_weight == 1
    assert routing.rows_per_expert().tolist() == [2, 1, 0] == RoutingStats.of(routing).rows_kept_E.tolist()


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_tokens_without_experts_have_an_output_of_0_and_finite_gradients(kernel: str) -> None:
    layer, x_TD = MoELayer(3, 5, 3, router_of()), torch.randn(7, 3)
    x_TD[2:5] = -x_TD[2:5].abs()
    with use_kernel(kernel):
        y_TD, _ = layer(x_TD)
        assert (y_TD[2:5] == 0).all() and y_TD[0].any()
        y_TD, routing = layer((-x_TD.abs()).requires_grad_())  # none has one
    assert (y_TD == 0).all() and routing.experts_per_token == 0
    (y_TD.sum() + routing.load_balance_loss + routing.z_loss * 0).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())


def test_a_capacity_keeps_the_largest_weights() -> None:
    layer = MoELayer(2, 5, 2, router_of(2), capacity_factor=1.0, min_capacity=1)
    _, routing = layer(torch.tensor([[0.5, 0.1], [0.6, -1.0], [0.7, 0.4]]))  # two of an expert
    assert routing.combine_weights().tolist() == [
        [0.0, about(0.1)],
        [about(0.6), 0.0],
        [about(0.7), about(0.4)],
    ]


def test_lambda_by_hand() -> None:
    """More than k experts per token, in all layers together: it grows; else it falls, down to its start."""
    model = nn.ModuleList([router_of(k=1.0), router_of(k=1.0)])

    def after(*taken: int) -> float:
        for router, experts in zip(model, taken, strict=True):
            router(torch.tensor([[1.0] * experts + [-1.0] * (3 - experts)] * 4))
        step_sparsity(model)
        assert_same(model[0].sparsity.l1_coeff, model[1].sparsity.l1_coeff)
        return model[0].sparsity.l1_coeff.item()

    assert after(3, 1) == about(START * 1.2)
    assert after(0, 3) == about(START * 1.2**2)
    assert after(0, 2) == about(START * 1.2)  # k of them: enough
    assert after(0, 1) == about(START)
    assert after(0, 0) == about(START)
    step_sparsity(model)  # a checkpoint is loaded: nothing was counted
    assert after(2, 2) == about(START * 1.2)
    for router in model:
        router.sparsity.l1_coeff.fill_(1 / START)
    assert after(3, 3) == about(1 / START)


def test_evaluation_and_batches_that_do_not_count_move_nothing() -> None:
    router = router_of()
    router.eval()(torch.ones(4, 3))
    router.train().counting = False
    router(torch.ones(4, 3))
    step_sparsity(router)
    assert router.sparsity.l1_coeff.item() == about(START)


def test_lambda_keeps_its_precision_and_goes_through_a_state_dict() -> None:
    router = router_of()
    router(torch.ones(4, 3))
    step_sparsity(router)
    assert list(router.state_dict()) == ["weight", "sparsity.l1_coeff"]
    half = copy.deepcopy(router).half()
    assert half.sparsity.l1_coeff.dtype == torch.float32
    again = router_of()
    again.load_state_dict(half.state_dict())
    assert torch.equal(again.sparsity.l1_coeff, router.sparsity.l1_coeff)
    again.load_state_dict({"weight": router.weight})  # of a model that had another router: it begins anew


def test_training_comes_to_k_experts_evenly_used() -> None:
    """From half of all. (Of tokens without anything in common half lie on either side of any W.)"""
    torch.manual_seed(0)
    layer, x_TD = MoELayer(8, 4, 12, ReLURouter(8, 12, 2.0)), torch.randn(256, 8) + 1
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    target, taken = torch.randn(256, 8), []
    for _ in range(400):
        y_TD, routing = layer(x_TD)
        loss = (y_TD - target).square().mean() + routing.load_balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step_sparsity(layer)
        taken.append(routing.experts_per_token)
    assert taken[0] > 5 and sum(taken[-100:]) / 100 == pytest.approx(2.0, abs=0.2)
    assert RoutingStats.of(routing).max_violation < 2


@pytest.mark.parametrize("device_order", [(30, 7), (0, 5)])
def test_ranks_go_as_one(device_order: tuple[int, int]) -> None:
    parts = [torch.randn(size, 3) - 0.3 for size in device_order]  # one rank may have no tokens

    def lambda_after(x_TD: Tensor) -> Tensor:
        router = router_of(k=0.9)
        for _ in range(3):
            router(x_TD)
            step_sparsity(router)
        return router.sparsity.l1_coeff

    together = lambda_after(torch.cat(parts))
    for other in run_ranks(2, lambda: lambda_after(parts[dist.get_rank()])):
        assert torch.equal(other, together)


def test_a_loop_that_never_steps_is_told_so() -> None:
    router = router_of()
    with pytest.warns(UserWarning, match=r"experts_per_token=1.0: .*xmoe_fairseq.moe.step_sparsity\(model\)"):
        for _ in range(MANY):
            router(torch.ones(4, 3))


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts_per_token must be in \(0, num_experts = 3\], got 4"):
        ReLURouter(3, 3, 4)
    with pytest.raises(ValueError, match="balance must be first with ReLURouter, whose loss is .*got bias"):
        router_of().balance_by("bias")
