"""What an expert keeps when it may not keep all (optional; dropless is the default)."""

import math
from dataclasses import replace

import torch

from xmoe_fairseq.moe.routing import Routing


def check_capacities(*values: float) -> None:
    """Raises ValueError: one of these numbers of an `MoELayer` is below 0, infinite or NaN."""
    if not all(0 <= value < math.inf for value in values):
        rule, got = "must be 0 or more, and finite", ", ".join(map(str, values))
        raise ValueError(f"capacity_factor, eval_capacity_factor and min_capacity {rule}, got {got}")


def expert_capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int) -> int:
    """Rows that one expert may keep: `max(min_capacity, ceil(T / E * capacity_factor))`, of T."""
    return max(min_capacity, math.ceil(min(num_tokens / num_experts * capacity_factor, num_tokens)))


def keep_within_capacity(routing: Routing, capacity: int) -> Routing:
    """Drop what overflows: an expert keeps first choices before second ones, then by probability.

    A dropped expert adds 0 for its token. Later tokens can displace earlier ones, so a capacity limit is
    neither causal nor independent of the batch.
    """
    # Stable sorts from the least to the most important key: probability, rank of choice, expert.
    order_R = torch.argsort(routing.weight_R.detach(), descending=True, stable=True)
    order_R = order_R[torch.argsort(routing.rank_R[order_R], stable=True)]
    order_R = order_R[torch.argsort(routing.expert_R[order_R], stable=True)]
    rows_per_expert = routing.rows_per_expert()
    first_row_E = rows_per_expert.cumsum(0) - rows_per_expert
    place_R = torch.arange(order_R.numel(), device=order_R.device) - first_row_E[routing.expert_R[order_R]]
    capacity = min(capacity, routing.num_tokens)
    kept_R = order_R[place_R < capacity].sort().values  # in their order of before
    expert_R = routing.expert_R[kept_R]
    in_order = None if routing.counts_in_order is None else (expert_R, rows_per_expert.clamp(max=capacity))
    return replace(
        routing,
        token_R=routing.token_R[kept_R],
        expert_R=expert_R,
        rank_R=routing.rank_R[kept_R],
        weight_R=routing.weight_R.index_select(0, kept_R),
        in_order=in_order,
    )
