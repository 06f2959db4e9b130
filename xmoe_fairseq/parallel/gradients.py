"""Gradients of experts that lie on some ranks only: their mean over ranks, and their share of the norm."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmoe_fairseq.parallel.groups import ExpertParallel

AT_ONCE = 2**28  # numbers that are reduced together, as by fairseq's legacy_ddp: what they are copied into


def experts_of(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are trained: the same on every rank."""
    return [p for p in parameters if hasattr(p, "expert") and p.requires_grad]


def reduce_expert_gradients(parameters: Iterable[nn.Parameter], parallel: ExpertParallel) -> None:
    """Leave each expert's gradient as DDP leaves the shared ones: the mean over all W ranks.

    The rows of its expert-parallel group's tokens have already come to an expert, so what is missing is
    the sum over replicas and the division by W. The replicas get the same bits.
    """
    world_size = parallel.size * parallel.replicas
    grads = []
    for parameter in experts_of(parameters):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad.div_(world_size))
    for bucket in buckets(grads) if parallel.replicas > 1 else ():
        flat_N = torch.cat([grad.flatten() for grad in bucket])  # one message is quicker than one for each
        dist.all_reduce(flat_N, group=parallel.replica_group)
        for grad, sum_N in zip(bucket, flat_N.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(sum_N.view_as(grad))


def buckets(grads: Iterable[Tensor], most: int = AT_ONCE) -> Iterator[list[Tensor]]:
    """In the order given, those of one dtype together, up to so many numbers, or one that is larger."""
    open_ones: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        bucket = open_ones[grad.dtype]
        if bucket and sum(each.numel() for each in [*bucket, grad]) > most:
            yield open_ones.pop(grad.dtype)
        open_ones[grad.dtype].append(grad)
    yield from open_ones.values()


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
