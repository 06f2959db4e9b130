"""Top-k routing: every token takes equally many experts."""

import torch
from torch import Tensor

from xmoe_fairseq.moe.routers.base import Router, by_preference


class TopKRouter(Router):
    """Every token takes its k most probable experts; k = 1 is Switch. Noise-free (Fedus et al. 2021)."""

    def __init__(self, model_dim: int, num_experts: int, k: int = 1) -> None:
        super().__init__(model_dim, num_experts)
        if not 1 <= k <= num_experts or k != int(k):
            raise ValueError(f"k must be a whole number in [1, num_experts = {num_experts}], got {k}")
        self.k = k

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        expert_TK = by_preference(probs_TE, self.k)[1]
        return expert_TK, torch.ones_like(expert_TK, dtype=torch.bool)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"
