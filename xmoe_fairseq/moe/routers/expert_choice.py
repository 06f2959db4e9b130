"""Expert choice: the experts choose tokens, not the tokens experts. For comparison."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from xmoe_fairseq.moe.routers.base import Router, by_preference
from xmoe_fairseq.moe.routers.registry import Flag, Place, register_router
from xmoe_fairseq.moe.routers.topk import TOPK, check_average, check_topk, experts_per_token


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """Every expert takes its `ceil(T * c / E)` most probable tokens. Zhou et al. 2022, arXiv 2202.09368.

    c, the paper's capacity factor, is the mean number of experts per token; a single token may get none or
    all of them. The load is even by construction, so there is no auxiliary loss. What a token gets depends
    on the other tokens of its batch, later ones included: not for causal models, and not batch-invariant.

    Args:
        experts_per_token: c, in (0, E].
    """

    description = (
        "none to all: every expert takes its best tokens; refused in decoders, which would see the future"
    )
    depends_on_batch = "yes"
    is_causal = False
    needs_balance_loss = False
    has_own_capacity = True
    takes_normalized = True
    flags: ClassVar[tuple[Flag, ...]] = (TOPK,)
    check = staticmethod(check_topk)

    def __init__(self, model_dim: int, num_experts: int, experts_per_token: float = 1.0) -> None:
        super().__init__(model_dim, num_experts)
        check_average(experts_per_token, num_experts)
        self.experts_per_token = experts_per_token

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        return "about ", experts_per_token(config)

    @classmethod
    def from_config(cls, place: Place) -> "ExpertChoiceRouter":
        return cls(place.model_dim, place.num_experts, experts_per_token=experts_per_token(place.config))

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        expert_TE = by_preference(probs_TE, self.num_experts)[1]
        return expert_TE, self.takes(logits_TE, probs_TE).gather(1, expert_TE)

    def takes(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """(T, E) bool: which expert takes which token."""
        return self.best_of_batch(probs_TE)

    def best_of_batch(self, score_TE: Tensor) -> Tensor:
        """(T, E) bool: the `ceil(T * c / E)` highest scores of each expert; of equals the earlier token."""
        tokens_each = math.ceil(score_TE.size(0) * self.experts_per_token / self.num_experts)
        token_TE = torch.sort(score_TE, dim=0, descending=True, stable=True).indices
        return torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, token_TE[:tokens_each], True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts_per_token={self.experts_per_token}"
