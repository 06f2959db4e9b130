"""Which ranks hold which experts.

With W ranks and groups of N, ranks 0 .. N-1 form the first expert-parallel group, N .. 2N-1 the second, ...
The i-th rank of every group holds the i-th E/N experts, so ranks i, N+i, 2N+i, ... hold replicas.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.distributed as dist
from fairseq.distributed.utils import new_groups
from torch import nn

from xmoe_fairseq.config import MoEConfig, expert_parallel_size
from xmoe_fairseq.moe import Experts


@dataclass(frozen=True)
class ExpertParallel:
    """This rank's place."""

    size: int  # N: ranks that hold one copy of all experts
    replicas: int  # copies of each expert
    expert_group: dist.ProcessGroup  # the N ranks with which this one shares out the experts
    replica_group: dist.ProcessGroup  # the ranks that hold the same experts as this one

    @property
    def in_first_group(self) -> bool:
        return dist.get_rank() < self.size

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertParallel":
        return self  # process groups are one thing, whichever model holds them


def expert_parallel(config: MoEConfig) -> ExpertParallel | None:
    """None if every rank holds all experts. All ranks must call it: making groups is a collective.

    Raises:
        ValueError: --moe-expert-parallel-size does not fit the number of ranks or of experts.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    size = expert_parallel_size(config, world_size)
    return _make_groups(size, dist.group.WORLD) if size > 1 else None


@cache
def _make_groups(size: int, world: dist.ProcessGroup) -> ExpertParallel:
    """By fairseq, which has every rank make every group, in the same order, and keep its own."""
    world_size = dist.get_world_size(world)
    expert_group = new_groups([list(range(first, first + size)) for first in range(0, world_size, size)])
    replica_group = new_groups([list(range(first, world_size, size)) for first in range(size)])
    return ExpertParallel(size, world_size // size, expert_group, replica_group)


def spread_experts(model: nn.Module, parallel: ExpertParallel) -> None:
    """Tell fairseq and torch that this model's experts are not the same on every rank."""
    names = expert_names(model)
    for name in names:
        model.get_parameter(name).expert = True  # type: ignore[attr-defined]  # fairseq's mark
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]  # torch's
    model.expert_parallel = parallel  # type: ignore[assignment]


def expert_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are stacks of experts."""
    return [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    ]
