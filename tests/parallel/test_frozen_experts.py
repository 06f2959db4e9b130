"""Frozen experts get no gradient from their replicas, and have no share in the norm."""

import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn

from xmoe_fairseq.parallel.gradients import norm_with_experts, reduce_expert_gradients
from xmoe_fairseq.parallel.groups import ExpertParallel


def expert(trained: bool) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2), requires_grad=trained)
    parameter.expert = True  # type: ignore[attr-defined]
    return parameter


def test_frozen_experts_on_several_ranks() -> None:
    def rank() -> tuple[bool, float, float]:
        parallel = ExpertParallel(2, 1, dist.group.WORLD, dist.group.WORLD)
        frozen, trained = expert(False), expert(True)
        trained.grad = torch.full((2,), 4.0)
        reduce_expert_gradients([frozen, trained], parallel)
        shared = torch.tensor(3.0)
        both = norm_with_experts(shared, [frozen, trained], parallel)
        return frozen.grad is None, norm_with_experts(shared, [frozen], parallel).item(), both.item()

    # trained: 4 / W = 2 in each of two numbers, on each of two ranks
    assert run_ranks(2, rank) == [(True, 3.0, 5.0)] * 2
