"""Routing -> rows at the rank that holds their expert, and back: one exchange on either side."""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xmoe_fairseq.moe.dispatch.all_to_all import exchange_counts, exchange_rows
from xmoe_fairseq.moe.dispatch.local import ExpertRows, expert_order
from xmoe_fairseq.moe.routing import Routing


@dataclass(frozen=True)
class WayBack:
    """R rows of this rank's tokens went out, S rows for this rank's experts came in."""

    token_R: Tensor  # of the rows that went out, in order of expert, and so of the rank that holds it
    weight_R: Tensor | None  # None = 1
    num_tokens: int
    send: list[int]  # rows for each rank
    receive: list[int]  # rows from each rank


class ExpertParallelDispatcher:
    """Experts lie on the N ranks of a group, E/N in order on each. One rank with all tokens is the truth.

    Counts travel first, then exactly the chosen rows: no capacity slots, no padding to the largest rank.
    All ranks of the group must call it the same number of times, also with zero tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExpertRows, WayBack]:
        order_R = expert_order(routing.expert_R)
        counts_E = routing.rows_per_expert()
        received_NE = exchange_counts(counts_E, self.group)
        way_back = WayBack(
            token_R=routing.token_R[order_R],
            weight_R=None if routing.all_ones else routing.weight_R[order_R],
            num_tokens=routing.num_tokens,
            # to the host, where the sizes of the exchange are set
            send=counts_E.view(received_NE.shape).sum(1).tolist(),
            receive=received_NE.sum(1).tolist(),
        )
        x_RD = x_TD.index_select(0, way_back.token_R)
        x_SD = exchange_rows(x_RD, way_back.send, way_back.receive, self.group)
        return x_SD, rows_in_arrival(received_NE, x_SD.size(0)), way_back

    def combine(self, y_SD: Tensor, way_back: WayBack) -> Tensor:
        """(T, D) weighted sums of this rank's tokens; 0 for a token without rows."""
        y_RD = exchange_rows(y_SD, way_back.receive, way_back.send, self.group)
        if way_back.weight_R is not None:
            y_RD = y_RD * way_back.weight_R.unsqueeze(1)
        y_TD = y_RD.new_zeros(way_back.num_tokens, y_RD.size(1))
        return y_TD.index_add(0, way_back.token_R, y_RD)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertParallelDispatcher":
        return copy(self)  # a process group is one thing, whoever holds it


def rows_in_arrival(received_NE: Tensor, num_rows: int) -> ExpertRows:
    """The rows of each expert held here among those that arrived by rank, then expert: within an expert by
    rank. Weights stay where the tokens are."""
    num_ranks, num_experts = received_NE.shape
    experts_NE = torch.arange(num_experts, device=received_NE.device).repeat(num_ranks)
    expert_R = experts_NE.repeat_interleave(received_NE.flatten(), output_size=num_rows)
    return ExpertRows(expert_order(expert_R), None, received_NE.sum(0))
