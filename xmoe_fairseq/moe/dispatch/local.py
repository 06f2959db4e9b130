"""Routing -> which expert computes which rows, and back. All in one process."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.routing import Routing


@dataclass(frozen=True)
class DispatchPlan:
    """Where rows go; what else `combine` needs to bring them back is the dispatcher's own."""

    rows: ExpertRows  # of the source rows, what the experts held here compute


class Dispatcher(Protocol):
    """What MoELayer needs."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]:
        """Source rows (S, D) for the experts held here, and the plan."""
        ...

    def combine(self, y_SD: Tensor, plan: Any) -> Tensor:
        """What the experts made of the source rows -> (T, D) weighted sums of this rank's tokens."""
        ...


class LocalDispatcher:
    """Source rows are the tokens themselves, and the experts' sums are the result."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]:
        return x_TD, DispatchPlan(ExpertRows.of(routing))

    def combine(self, y_SD: Tensor, plan: DispatchPlan) -> Tensor:
        return y_SD
