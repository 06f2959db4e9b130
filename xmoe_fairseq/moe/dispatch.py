"""Routing -> rows in expert order, and back. One process; every expert is here."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from xmoe_fairseq.moe.routing import Routing


class Dispatcher(Protocol):
    """What MoELayer needs. The plan is the dispatcher's own, but for its `rows_per_expert` (a list)."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """The rows for the experts held here, in expert order, and how to bring them back."""
        ...

    def combine(self, rows_RD: Tensor, plan: Any) -> Tensor:
        """The experts' outputs -> (T, D) weighted sums of this rank's tokens."""
        ...


@dataclass(frozen=True)
class DispatchPlan:
    """How R rows lie: all rows of expert 0, then of expert 1, ...; tokens in order within an expert."""

    token_R: Tensor
    weight_R: Tensor
    rows_per_expert: list[int]
    num_tokens: int


class LocalDispatcher:
    """Gathers exactly the chosen rows: no capacity slots, no padding to the largest expert."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]:
        order_R = torch.argsort(routing.expert_R, stable=True)
        plan = DispatchPlan(
            token_R=routing.token_R[order_R],
            weight_R=routing.weight_R[order_R],
            rows_per_expert=routing.rows_per_expert().tolist(),
            num_tokens=routing.num_tokens,
        )
        return x_TD.index_select(0, plan.token_R), plan

    def combine(self, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """(T, D) weighted sums, in the weights' precision; 0 for a token without rows."""
        weighted_RD = rows_RD * plan.weight_R.unsqueeze(-1)
        y_TD = weighted_RD.new_zeros(plan.num_tokens, rows_RD.size(-1))
        return y_TD.index_add(0, plan.token_R, weighted_RD)
