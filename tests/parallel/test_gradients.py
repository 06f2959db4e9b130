"""Gradients of experts that lie on several ranks."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn

from xmoe_fairseq.parallel.gradients import buckets, norm_with_experts, reduce_expert_gradients
from xmoe_fairseq.parallel.groups import ExpertParallel


def expert(trained: bool) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2), requires_grad=trained)
    parameter.expert = True  # type: ignore[attr-defined]
    return parameter


def test_frozen_experts_on_several_ranks() -> None:
    """They get no gradient from their replicas, and have no share in the norm."""

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


def test_replicas_reduce_all_gradients_of_one_type_in_one_message() -> None:
    """8 stacks of experts, as 2 layers have, one without a gradient; and one of another type."""

    def rank() -> tuple[int, list[torch.Tensor]]:
        parallel = ExpertParallel(1, 2, dist.group.WORLD, dist.group.WORLD)
        parameters = [expert(True) for _ in range(9)]
        parameters[-1].data = parameters[-1].data.bfloat16()
        for number, parameter in enumerate(parameters[1:], 1):
            parameter.grad = torch.tensor([1, 10 * (1 + dist.get_rank())]).mul(number).to(parameter.dtype)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            reduce_expert_gradients(parameters, parallel)
        return all_reduce.call_count, [parameter.grad for parameter in parameters]  # type: ignore[misc]

    for messages, grads in run_ranks(2, rank):
        assert messages == 2
        assert [grad.tolist() for grad in grads] == [[number, 15 * number] for number in range(9)]
        assert [grad.dtype for grad in grads] == [torch.float32] * 8 + [torch.bfloat16]


def test_a_message_has_a_size() -> None:
    sizes = [3, 3, 2, 9, 1, 7]
    found = [[len(grad) for grad in bucket] for bucket in buckets(map(torch.zeros, sizes), most=8)]
    assert found == [[3, 3, 2], [9], [1, 7]]
    assert list(buckets([])) == []
