"""Which expert computes which rows, and the weighted sums that are made of what it gives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xmoe_fairseq.moe.dispatch.gather_sum import BySource, sum_rows
from xmoe_fairseq.moe.routing import Routing


@dataclass(frozen=True)
class ExpertRows:
    """R rows to compute: all rows of expert 0, then of expert 1, ...; within an expert in order of source.

    Row r is computed from source row `source_R[r]`, and its result is added to the same row of the output.
    Nothing is gathered yet: an expert gathers its own rows, which then fit into the cache.
    """

    source_R: Tensor
    weight_R: Tensor | None  # times which a row's result is added, at least fp32; None = 1
    counts_E: Tensor  # how many rows each of the experts has

    @classmethod
    def of(cls, routing: Routing) -> "ExpertRows":
        """Exactly the chosen rows, from the tokens: no capacity slots, no padding to the largest expert."""
        token_R, weight_R = routing.token_R, None if routing.all_ones else routing.weight_R
        if routing.counts_in_order is None:
            order_R = torch.argsort(routing.expert_R, stable=True)  # within an expert the order stays
            token_R, weight_R = token_R[order_R], None if weight_R is None else weight_R[order_R]
        return cls(token_R, weight_R, routing.rows_per_expert())

    def by_source(self, num_sources: int) -> BySource:
        return BySource.of(self.source_R, num_sources)

    def weighted_sum(self, y_RD: Tensor, num_sources: int, dtype: torch.dtype | None = None) -> Tensor:
        """(S, D) `y_s = sum of weight_r * y_r` over the rows r of source s; 0 for a source without rows.

        This is what combine means. A kernel ends with it, or does the same while it has the rows at hand
        (native/experts.cpp). What comes back from other ranks are such sums, which then have the weight 1.

        Args:
            dtype: of the result; None = that of y and the weights together.
        """
        return sum_rows(y_RD, self.by_source(num_sources), self.weight_R, dtype)
