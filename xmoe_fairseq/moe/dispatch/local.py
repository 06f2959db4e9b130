"""Routing -> which expert computes which rows, in expert order, and back. All in one process."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from xmoe_fairseq.moe.routing import Routing


@dataclass(frozen=True)
class ExpertRows:
    """R rows to compute: all rows of expert 0, then of expert 1, ...; within an expert in order of source.

    Row r is computed from source row `source_R[r]`, and its result is added to the same row of the output.
    Nothing is gathered yet: an expert gathers its own rows, which then fit into the cache.
    """

    source_R: Tensor
    weight_R: Tensor | None  # times which a row's result is added, at least fp32; None = 1
    counts_E: Tensor  # how many rows each of the experts held here has


class Dispatcher(Protocol):
    """What MoELayer needs. The way back is the dispatcher's own."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExpertRows, Any]:
        """Source rows (S, D), which of them the experts held here compute, and the way back."""
        ...

    def combine(self, y_SD: Tensor, way_back: Any) -> Tensor:
        """What the experts made of the source rows -> (T, D) weighted sums of this rank's tokens."""
        ...


class LocalDispatcher:
    """Source rows are the tokens themselves, and the experts' sums are the result.

    Exactly the chosen rows: no capacity slots, no padding to the largest expert.
    """

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExpertRows, None]:
        order_R = expert_order(routing.expert_R)
        rows = ExpertRows(
            source_R=routing.token_R[order_R],
            weight_R=None if routing.all_ones else routing.weight_R[order_R],
            counts_E=routing.rows_per_expert(),
        )
        return x_TD, rows, None

    def combine(self, y_SD: Tensor, way_back: None) -> Tensor:
        return y_SD


def expert_order(expert_R: Tensor) -> Tensor:
    """(R,) the order by expert, which keeps the order within an expert."""
    return torch.argsort(expert_R, stable=True)
