"""Top-k routing: every token takes equally many experts."""

from typing import Any

from torch import Tensor

from xmoe_fairseq.moe.native.routing import Chosen, can_choose, choose_experts
from xmoe_fairseq.moe.routers.balance_flags import BALANCE
from xmoe_fairseq.moe.routers.base import Router, by_preference
from xmoe_fairseq.moe.routers.cheap_flags import CHEAP, num_cheap
from xmoe_fairseq.moe.routers.registry import Flag, Place, register_router

TOPK = Flag(
    "moe_topk", 0, "experts per token; on average with expert_choice, expert_threshold, seq_topk and relu, "
    "which trains towards it; 0 = --moe-ffn-split less --moe-shared-experts, the FLOPs of the dense FFN",
    rule="must be 0 (= --moe-ffn-split) or more", holds=lambda config: config.moe_topk >= 0,
    refused_elsewhere=True,
)  # fmt: skip


def experts_per_token(config: Any) -> int:
    """k, of the flags: routed ones."""
    return int(config.moe_topk or max(config.moe_ffn_split - config.moe_shared_experts, 1))


def check_average(per_token: float, num_experts: int) -> None:
    """Of a router whose tokens take so many experts on average. Raises ValueError."""
    if not 0 < per_token <= num_experts:
        rule = f"must be in (0, num_experts = {num_experts}]"
        raise ValueError(f"experts_per_token {rule}, got {per_token}")


def check_topk(config: Any, num_layers: int) -> None:
    """Raises ValueError."""
    if num_layers and experts_per_token(config) > config.moe_num_experts:
        rule = f"must be at most --moe-num-experts {config.moe_num_experts}"
        raise ValueError(f"--moe-topk (default: --moe-ffn-split) {rule}, got {experts_per_token(config)}")


@register_router("topk")
class TopKRouter(Router):
    """Every token takes its k most probable experts; k = 1 is Switch. Noise-free (Fedus et al. 2021)."""

    description = "the k most probable; k = 1 is Switch"
    takes_ones = takes_normalized = True
    flags = (TOPK, *BALANCE, *CHEAP)
    check = staticmethod(check_topk)

    def __init__(self, model_dim: int, num_experts: int, k: int = 1) -> None:
        super().__init__(model_dim, num_experts)
        if not 1 <= k <= num_experts or k != int(k):
            raise ValueError(f"k must be a whole number in [1, num_experts = {num_experts}], got {k}")
        self.k = k

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        return "at most " if num_cheap(config) else "", experts_per_token(config)

    @classmethod
    def from_config(cls, place: Place) -> "TopKRouter":
        return cls(place.model_dim, place.num_experts, k=experts_per_token(place.config))

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        return by_preference(probs_TE, self.k)[1], None

    def choose_natively(self, logits_TE: Tensor) -> Chosen | None:
        is_native = can_choose(logits_TE) and self.chooses_as(TopKRouter)
        return choose_experts(logits_TE, self.k) if is_native else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"
