"""Routing -> which expert computes which rows, and back. All in one process."""

from typing import Any

from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.routing import Routing


class LocalDispatcher:
    """Source rows are the tokens themselves, and the experts' sums are the result."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExpertRows, Any]:
        """Source rows (S, D), what the experts held here compute of them, and what `combine` has to know."""
        return x_TD, ExpertRows.of(routing), None

    def combine(self, y_SD: Tensor, sent: Any) -> Tensor:
        """What the experts made of the source rows -> (T, D) weighted sums of this rank's tokens."""
        return y_SD
