"""DynMoE's router: every expert has a threshold of its own, which is learned."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.native.routing import Chosen
from xmoe_fairseq.moe.routers.base import Router, by_preference
from xmoe_fairseq.moe.routers.registry import Place, register_router
from xmoe_fairseq.moe.routers.threshold import MOST, max_experts_per_token
from xmoe_fairseq.moe.routing import count


@register_router("topany")
class TopAnyRouter(Router):
    """A token takes the experts with sigmoid(s_e) > sigmoid(G_e), the best where there are none.

    s is the cosine of x and the expert's vector, G a learned threshold, both over the temperature. Its k
    experts have the weight 1 / k each; how far a score passes is no weight, but has the gradient of one
    (straight-through: as `(1 + m - m) / k`, m the sigmoids' difference). G begins at 0, so that half of all
    experts pass; nothing steers how many do, but `max_experts_per_token` bounds them. The loss is
    `||W W^T - 1||_F`, of W's normalised rows, plus the mean length of W's rows: diversity and simplicity.
    Guo et al. 2024 (DynMoE), section 3.1, arXiv 2405.14297.

    In training a token that passes nowhere has no expert there, and waits until one is added for such tokens.
    Here no expert is added or removed, and it has its best one, as in evaluation.

    Args:
        max_experts_per_token: keep only a token's best; 0 = no limit.
    """

    description = "DynMoE: those whose cosine passes a learned threshold of theirs, or the best; weight 1/k"
    has_own_loss = True
    flags = (MOST,)

    def __init__(self, model_dim: int, num_experts: int, max_experts_per_token: int = 0) -> None:
        super().__init__(model_dim, num_experts)
        if max_experts_per_token < 0 or max_experts_per_token != int(max_experts_per_token):
            must = "must be 0 (no limit) or a whole number"
            raise ValueError(f"max_experts_per_token {must}, got {max_experts_per_token}")
        self.max_experts_per_token = max_experts_per_token
        nn.init.orthogonal_(self.weight)
        self.threshold_E = nn.Parameter(torch.zeros(num_experts))

    @classmethod
    def check(cls, config: Any, num_layers: int) -> None:
        if config.moe_router_init_scale != 1:
            rule = "must be 1 with --moe-router topany, whose scores are cosines"
            raise ValueError(f"--moe-router-init-scale {rule}, got {config.moe_router_init_scale}")

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        most: int = config.moe_num_experts
        return "at most ", min(max_experts_per_token(config) or most, most)

    @classmethod
    def from_config(cls, place: Place) -> "TopAnyRouter":
        return cls(place.model_dim, place.num_experts, max_experts_per_token(place.config))

    def score(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD, weight_ED = F.normalize(x_TD.to(dtype)), F.normalize(self.weight.to(dtype))
        return F.linear(x_TD, weight_ED) / self.temperature

    def passed(self, logits_TE: Tensor) -> Tensor:
        """(T, E) by how much; above 0 an expert is taken."""
        return torch.sigmoid(logits_TE) - torch.sigmoid(
            self.threshold_E.to(logits_TE.dtype) / self.temperature
        )

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        passes_TE, score_TE = self.passed(logits_TE) > 0, torch.sigmoid(logits_TE)
        # Those that pass before the others; a power of 2 rounds nothing.
        preference_TE = torch.where(passes_TE, score_TE, score_TE * 2.0**-32)
        limit = min(self.max_experts_per_token or self.num_experts, self.num_experts)
        expert_TK = by_preference(preference_TE, limit)[1]
        chosen_TK = passes_TE.gather(1, expert_TK)
        chosen_TK[:, 0] = True
        return expert_TK, chosen_TK

    def combine_weight(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """1, with the gradient of `passed`."""
        passed_TE = self.passed(logits_TE)
        return 1.0 + (passed_TE - passed_TE.detach())

    def chosen(self, logits_TE: Tensor) -> Chosen:
        chosen = super().chosen(logits_TE)
        taken_T = count(chosen.token_R, logits_TE.size(0))
        return chosen._replace(weight_R=chosen.weight_R / taken_T[chosen.token_R])

    def balance(self, probs_TE: Tensor, first_choice_T: Tensor) -> Tensor:
        """The loss of diversity and simplicity, which asks for no tokens."""
        weight_ED = self.weight.to(probs_TE.dtype)
        direction_ED = F.normalize(weight_ED)
        one_EE = torch.eye(self.num_experts, dtype=probs_TE.dtype, device=probs_TE.device)
        diversity = torch.linalg.norm(direction_ED @ direction_ED.T - one_EE)
        loss: Tensor = diversity + torch.linalg.norm(weight_ED, dim=1).mean()
        return loss

    def to_log(self) -> dict[str, Tensor | float]:
        return {"learned_threshold": self.threshold_E.detach().mean()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_experts_per_token={self.max_experts_per_token or 'none'}"
