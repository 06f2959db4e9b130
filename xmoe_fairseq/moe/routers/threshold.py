"""The paper's router: each token takes experts until their mass reaches t."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.budget import Budget
from xmoe_fairseq.moe.routers.base import Router, by_preference


class ThresholdRouter(Router):
    """A token takes experts in order of probability while the mass before an expert is below t.

    At least one expert always; `threshold=0` is top-1, `threshold=1` is all experts.
    Yang et al. 2024 (XMoE), section 3.2, arXiv 2403.18926.

    Args:
        threshold: t in [0, 1].
        max_experts_per_token: keep only a token's first choices; 0 = no limit. Unlike capacity it
            depends on the token alone, so it is causal and the same in any batch.
        target_experts_per_token: steer t to this average instead (see `budget.py`; it takes a call of
            `step_budgets` after each update); 0 = `threshold` as it is.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        threshold: float = 0.9,
        max_experts_per_token: int = 0,
        target_experts_per_token: float = 0.0,
    ) -> None:
        super().__init__(model_dim, num_experts)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        if max_experts_per_token < 0 or max_experts_per_token != int(max_experts_per_token):
            raise ValueError(
                f"max_experts_per_token must be 0 (no limit) or a whole number, got {max_experts_per_token}"
            )
        self.threshold = threshold
        self.max_experts_per_token = max_experts_per_token
        if target_experts_per_token and not 1 <= target_experts_per_token <= self.limit:
            raise ValueError(
                "target_experts_per_token must be 0 (none) or from 1 to the experts that a token may take, "
                f"{self.limit}, got {target_experts_per_token}"
            )
        if target_experts_per_token:
            self.budget = Budget(target_experts_per_token, num_experts)

    @property
    def limit(self) -> int:
        """Experts that a token may take."""
        return min(self.max_experts_per_token or self.num_experts, self.num_experts)

    @property
    def threshold_in_use(self) -> Tensor | float:
        return self.threshold if self.budget is None else self.budget.threshold

    def candidates(self, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The probability of the better choices together, and the expert, of each that a token may take."""
        sorted_TK, expert_TK = by_preference(probs_TE, self.limit)
        return F.pad(sorted_TK.cumsum(dim=1)[:, :-1], (1, 0)), expert_TK

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        mass_before_TK, expert_TK = self.candidates(probs_TE)
        if self.budget is not None:
            chosen_TK = self.budget.take(mass_before_TK)
        elif self.threshold == 1.0:  # a rounded sum may reach 1 before the last expert
            chosen_TK = torch.ones_like(mass_before_TK, dtype=torch.bool)
        else:
            chosen_TK = mass_before_TK < self.threshold
        chosen_TK[:, 0] = True
        return expert_TK, chosen_TK

    def extra_repr(self) -> str:
        limit = self.max_experts_per_token or "none"
        threshold = self.threshold if self.budget is None else "steered"
        return f"{super().extra_repr()}, threshold={threshold}, max_experts_per_token={limit}"
