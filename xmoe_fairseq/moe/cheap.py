"""Experts that compute next to nothing: a token that needs no more takes one of them in the place of an FFN.

A router scores them with the others; behind it their rows are taken out of the `Routing`, so capacity,
dispatch and kernels never see them.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.routing import Routing


class CheapExperts(nn.Module):
    """`zero`: E(x) = 0. `copy`: E(x) = x. `constant`: E(x) = a_1 x + a_2 v, (a_1, a_2) = softmax(W x).

    v (D,) and W (2, D) are learned by each. Jin et al. 2024 (MoE++), section 3.1, arXiv 2410.07348; zero
    experts are the null experts of AdaMoE (Zeng et al. 2024, arXiv 2406.13233). The outputs are weighted as
    those of the other experts. Of an FFN's 4 D F operations on a token they take 8 D at most: no FLOPs here.

    Args:
        model_dim: D.
        zero, copy, constant: how many of each, Z in all; the last Z of the experts that a router scores.
        balance: times which they count in a load-balance loss: MoE++'s tau (0.75 there).

    Raises:
        ValueError: a number below 0, or none at all; balance not above 0.
    """

    def __init__(
        self, model_dim: int, zero: int = 0, copy: int = 0, constant: int = 0, balance: float = 1.0
    ) -> None:
        super().__init__()
        self.numbers, self.balance = (zero, copy, constant), balance
        if min(self.numbers) < 0 or not sum(self.numbers):
            raise ValueError(f"zero, copy and constant must be 0 or more, not all 0, got {self.numbers}")
        if not balance > 0:
            raise ValueError(f"balance must be above 0, got {balance}")
        if constant:
            self.vector_CD = nn.Parameter(torch.randn(constant, model_dim))
            self.mix = nn.Linear(model_dim, 2 * constant, bias=False)

    def __len__(self) -> int:
        return sum(self.numbers)

    def take_out(self, routing: Routing) -> tuple[Routing, Tensor]:
        """The rows of the other experts, and (T, Z) the weights of these; 0 where one was not chosen."""
        first, counts_E = routing.num_experts - len(self), routing.counts_in_order
        weight_TZ = routing.combine_weights()[:, first:]
        (kept_R,) = (routing.expert_R < first).nonzero(as_tuple=True)  # in the order in which they were
        expert_R = routing.expert_R[kept_R]
        others = replace(
            routing,
            token_R=routing.token_R[kept_R],
            expert_R=expert_R,
            rank_R=routing.rank_R[kept_R],
            weight_R=routing.weight_R.index_select(0, kept_R),
            rows_wanted=kept_R.numel(),
            rows_cheap=routing.rows_wanted - kept_R.numel(),
            num_cheap=len(self),
            in_order=None if counts_E is None else (expert_R, counts_E[:first]),
        )
        return others, weight_TZ

    def forward(self, x_TD: Tensor, weight_TZ: Tensor) -> Tensor:
        """(T, D) the weighted sums of what they give, in the precision of the weights."""
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = weight_TZ.dtype
            x_TD = x_TD.to(dtype)
            _, copy_TN, constant_TC = weight_TZ.split(self.numbers, dim=1)
            times_T1 = copy_TN.sum(dim=1, keepdim=True)
            if not self.numbers[-1]:
                return times_T1 * x_TD  # type: ignore[no-any-return]
            mix_TC2: Tensor = F.linear(x_TD, self.mix.weight.to(dtype)).unflatten(1, (-1, 2)).softmax(dim=-1)
            own_TC, vector_TC = (constant_TC.unsqueeze(2) * mix_TC2).unbind(dim=2)
            times_T1 = times_T1 + own_TC.sum(dim=1, keepdim=True)
            sums_TD: Tensor = times_T1 * x_TD + vector_TC @ self.vector_CD.to(dtype)
            return sums_TD

    def extra_repr(self) -> str:
        zero, copy, constant = self.numbers
        return f"zero={zero}, copy={copy}, constant={constant}, balance={self.balance}"
