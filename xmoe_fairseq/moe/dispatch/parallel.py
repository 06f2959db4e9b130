"""Routing -> rows at the rank that holds their expert, and back: one exchange on either side."""

from copy import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xmoe_fairseq.moe.dispatch.all_to_all import exchange_rows
from xmoe_fairseq.moe.dispatch.local import LocalDispatcher
from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.routing import Routing


class Sent(NamedTuple):
    """R rows of this rank's tokens went out, S rows for this rank's experts came in."""

    rows: ExpertRows  # what went out, in order of expert, and so of the rank that holds it
    num_tokens: int
    send: list[int]  # rows for each rank
    receive: list[int]  # rows from each rank


class ExpertParallelDispatcher(LocalDispatcher):
    """Experts lie on the N ranks of a group, E/N in order on each. One rank with all tokens is the truth.

    Counts travel first, then exactly the chosen rows: no capacity slots, no padding to the largest rank.
    All ranks of the group must call it the same number of times, also with zero tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExpertRows, Sent]:
        out = ExpertRows.of(routing)
        received_E = torch.empty_like(out.counts_E)
        dist.all_to_all_single(received_E, out.counts_E, group=self.group)
        received_NE = received_E.view(dist.get_world_size(self.group), -1)  # of E/N experts, by rank
        # to the host, where the sizes of the exchange are set
        send = out.counts_E.view(received_NE.shape).sum(1).tolist()
        receive = received_NE.sum(1).tolist()
        x_SD = exchange_rows(x_TD.index_select(0, out.source_R), send, receive, self.group)
        return x_SD, rows_in_arrival(received_NE, x_SD.size(0)), Sent(out, routing.num_tokens, send, receive)

    def combine(self, y_SD: Tensor, sent: Sent) -> Tensor:
        y_RD = exchange_rows(y_SD, sent.receive, sent.send, self.group)
        return sent.rows.weighted_sum(y_RD, sent.num_tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertParallelDispatcher":
        return copy(self)  # a process group is one thing, whoever holds it


def dispatcher_for(group: dist.ProcessGroup | None) -> tuple[LocalDispatcher, tuple[int, int]]:
    """And (i, N): the i-th of N equal parts of the experts lies here. None = all of them do."""
    if group is None:
        return LocalDispatcher(), (0, 1)
    return ExpertParallelDispatcher(group), (dist.get_rank(group), dist.get_world_size(group))


def rows_in_arrival(received_NE: Tensor, num_rows: int) -> ExpertRows:
    """The rows of each expert held here among those that arrived by rank, then expert: within an expert by
    rank.

    Weights stay where the tokens are. Sent along they would cost one more exchange forward and one backward,
    and weighted rows would come back in fp32, twice the bytes of bf16, or rounded a second time.
    """
    num_ranks, num_experts = received_NE.shape
    experts_NE = torch.arange(num_experts, device=received_NE.device).repeat(num_ranks)
    expert_R = experts_NE.repeat_interleave(received_NE.flatten(), output_size=num_rows)
    return ExpertRows(torch.argsort(expert_R, stable=True), None, received_NE.sum(0))
