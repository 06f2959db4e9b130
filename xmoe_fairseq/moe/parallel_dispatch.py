"""Routing -> rows at the rank that holds their expert, and back. LocalDispatcher over an exchange."""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xmoe_fairseq.moe.all_to_all import exchange_counts, exchange_rows
from xmoe_fairseq.moe.dispatch import DispatchPlan, LocalDispatcher
from xmoe_fairseq.moe.routing import Routing


@dataclass(frozen=True)
class ExpertParallelPlan:
    """S rows of this rank's tokens go out, R rows for this rank's experts come in."""

    sent: DispatchPlan  # this rank's own rows in order of expert, and so in order of the rank that holds it
    send: list[int]  # rows for each rank
    receive: list[int]  # rows from each rank
    order_R: Tensor  # from the order of arrival (by rank, then expert) to the order of expert
    rows_per_expert: list[int]  # of this rank's experts


class ExpertParallelDispatcher:
    """Experts lie on the N ranks of a group, E/N in order on each. One rank with all tokens is the truth.

    Counts travel first, then exactly the chosen rows: no capacity slots, no padding to the largest rank.
    All ranks of the group must call it the same number of times, also with zero tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExpertParallelPlan]:
        rows_SD, sent = self.local.dispatch(x_TD, routing)
        received_NE = exchange_counts(routing.rows_per_expert(), self.group)
        counts = received_NE.tolist()  # to the host, where the sizes of the exchange are set
        per_rank = len(counts[0])
        plan = ExpertParallelPlan(
            sent=sent,
            send=[
                sum(sent.rows_per_expert[i : i + per_rank]) for i in range(0, routing.num_experts, per_rank)
            ],
            receive=[sum(from_rank) for from_rank in counts],
            order_R=expert_order(received_NE, sum(map(sum, counts))),
            rows_per_expert=[sum(of_expert) for of_expert in zip(*counts, strict=True)],
        )
        rows_RD = exchange_rows(rows_SD, plan.send, plan.receive, self.group)
        return rows_RD.index_select(0, plan.order_R), plan

    def combine(self, rows_RD: Tensor, plan: ExpertParallelPlan) -> Tensor:
        """(T, D) weighted sums of this rank's tokens, as LocalDispatcher.combine."""
        arrival_R = torch.empty_like(plan.order_R)
        arrival_R[plan.order_R] = torch.arange(plan.order_R.numel(), device=plan.order_R.device)
        rows_SD = exchange_rows(rows_RD.index_select(0, arrival_R), plan.receive, plan.send, self.group)
        return self.local.combine(rows_SD, plan.sent)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertParallelDispatcher":
        return copy(self)  # a process group is one thing, whoever holds it


def expert_order(received_NE: Tensor, num_rows: int) -> Tensor:
    """(R,) stable order by expert of rows that arrived by rank, then expert: within an expert by rank."""
    num_ranks, num_experts = received_NE.shape
    experts_NE = torch.arange(num_experts, device=received_NE.device).repeat(num_ranks)
    return torch.argsort(
        experts_NE.repeat_interleave(received_NE.flatten(), output_size=num_rows), stable=True
    )
