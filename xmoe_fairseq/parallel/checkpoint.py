"""One checkpoint for any number of ranks: experts are stacked when it is written and sliced when it is read.

A gathered checkpoint is what one process with all experts would write, name by name and shape by shape.
"""

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmoe_fairseq.moe.experts.experts import slice_experts
from xmoe_fairseq.parallel.groups import ExpertParallel, expert_names

State = dict[str, Any]


def gather_model(state: State, model: nn.Module, parallel: ExpertParallel) -> State:
    """A model's state dict with all experts, complete on rank 0. A collective of the first group."""
    whole = copy(state)  # with its metadata
    whole.update({name: gather_experts(state[name], parallel) for name in expert_names(model)})
    return whole


def gather_optimizer(state: State, parameters: Iterable[nn.Parameter], parallel: ExpertParallel) -> State:
    """The same for an optimizer's state dict: what is shaped like an expert stack becomes whole.

    Args:
        parameters: the optimizer's, in its order.
    """

    def gather(value: Tensor, stack: nn.Parameter) -> Tensor:
        return gather_experts(value, parallel) if value.shape == stack.shape else value

    return _of_experts(state, parameters, gather)


def slice_optimizer(state: State, parameters: Iterable[nn.Parameter], parallel: ExpertParallel) -> State:
    """Of a whole optimizer state dict what belongs to this rank's experts."""

    def slice_(value: Tensor, stack: nn.Parameter) -> Tensor:
        held = stack.size(0)
        return slice_experts(value, held * parallel.size, stack, dist.get_rank(parallel.expert_group) * held)

    return _of_experts(state, parameters, slice_)


def _of_experts(
    state: State, parameters: Iterable[nn.Parameter], change: Callable[[Tensor, nn.Parameter], Tensor]
) -> State:
    slots = dict(state["state"])
    for index, stack in enumerate(parameters):
        if hasattr(stack, "expert") and index in slots:
            slots[index] = {
                name: change(value, stack) if isinstance(value, Tensor) else value
                for name, value in slots[index].items()
            }
    return {**state, "state": slots}


def gather_experts(held: Tensor, parallel: ExpertParallel) -> Tensor:
    """The slices of the first group, stacked on the CPU of rank 0; other ranks get their own back."""
    if not parallel.in_first_group:
        return held
    is_first = dist.get_rank() == 0
    parts = [torch.empty_like(held) for _ in range(parallel.size)] if is_first else None
    dist.gather(held.detach().contiguous(), parts, dst=0, group=parallel.expert_group)
    return held if parts is None else torch.cat([part.cpu() for part in parts])
