"""Gradients of experts that lie on some ranks only: their mean over ranks, and their share of the norm."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmoe_fairseq.parallel.groups import ExpertParallel


def experts_of(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are trained: the same on every rank."""
    return [p for p in parameters if hasattr(p, "expert") and p.requires_grad]


def reduce_expert_gradients(parameters: Iterable[nn.Parameter], parallel: ExpertParallel) -> None:
    """Leave each expert's gradient as DDP leaves the shared ones: the mean over all W ranks.

    The rows of its expert-parallel group's tokens have already come to an expert, so what is missing is
    the sum over replicas and the division by W. The replicas get the same bits.
    """
    world_size = parallel.size * parallel.replicas
    for parameter in experts_of(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(world_size)
        if parallel.replicas > 1:
            dist.all_reduce(parameter.grad, group=parallel.replica_group)


def norm_with_experts(
    shared_norm: Tensor, parameters: Iterable[nn.Parameter], parallel: ExpertParallel
) -> Tensor:
    """The norm of all gradients, each expert counted once; the same bits on every rank.

    Args:
        shared_norm: norm of the gradients that every rank has.
    """
    grads = [p.grad for p in experts_of(parameters) if p.grad is not None]
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    none = shared_norm.new_zeros(())
    squares = torch.stack([none, *norms]).double().square().sum()
    dist.all_reduce(squares)  # over all ranks, not one group: no two ranks may clip by different bits
    return (shared_norm.double().square() + squares / parallel.replicas).sqrt().to(shared_norm.dtype)
