"""DynMoE's router: every expert has a threshold of its own, which is learned."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.native.routing import Chosen
from xmoe_fairseq.moe.pool import CLOSED, ExpertPool
from xmoe_fairseq.moe.routers.base import Router, by_preference
from xmoe_fairseq.moe.routers.registry import Flag, Place, register_router
from xmoe_fairseq.moe.routers.threshold_flags import MOST, max_experts_per_token, most_experts
from xmoe_fairseq.moe.routing import Routing, count
from xmoe_fairseq.moe.steered import of_all_ranks


def initial_is_possible(config: Any) -> bool:
    initial: int = config.moe_initial_experts
    return initial == 0 or (config.moe_adapt_experts_every > 0 and 1 <= initial <= config.moe_num_experts)


ADAPT = (
    Flag(
        "moe_adapt_experts_every", 0, "after every so many updates each MoE layer drops the experts that got "
        "no token in them, and takes one more into use, if there is one, where some tokens passed no "
        "threshold; 0 = never (the authors: 900, by the records of 300)",
        rule="must be 0 (never) or more", holds=lambda config: config.moe_adapt_experts_every >= 0,
        refused_elsewhere=True,
    ),
    Flag(
        "moe_initial_experts", 0, "so many of the E experts are in use at first; 0 = all",
        rule="must be 0 (all) or, with --moe-adapt-experts-every, from 1 to --moe-num-experts",
        holds=initial_is_possible, refused_elsewhere=True,
    ),
)  # fmt: skip


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
    Here it has its best one, as in evaluation. Experts are added and removed as `ExpertPool` says; it takes a
    call of `step_expert_pools` after each update. The loss is of those in use.

    Args:
        max_experts_per_token: keep only a token's best; 0 = no limit.
        adapt_experts_every: updates after which experts are added and removed; 0 = they stay.
        initial_experts: so many are in use at first; 0 = all.

    Raises:
        ValueError: one of them is out of range.
    """

    description = "DynMoE: those whose cosine passes a learned threshold of theirs, or the best; weight 1/k"
    has_own_loss = True
    flags = (MOST, *ADAPT)

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        max_experts_per_token: int = 0,
        adapt_experts_every: int = 0,
        initial_experts: int = 0,
    ) -> None:
        super().__init__(model_dim, num_experts)
        if max_experts_per_token < 0 or max_experts_per_token != int(max_experts_per_token):
            must = "must be 0 (no limit) or a whole number"
            raise ValueError(f"max_experts_per_token {must}, got {max_experts_per_token}")
        self.max_experts_per_token = max_experts_per_token
        nn.init.orthogonal_(self.weight)
        self.threshold_E = nn.Parameter(torch.zeros(num_experts))
        self.pool = ExpertPool(model_dim, num_experts, initial_experts or num_experts, adapt_experts_every)

    @classmethod
    def check(cls, config: Any, num_layers: int) -> None:
        if config.moe_router_init_scale != 1:
            rule = "must be 1 with --moe-router topany, whose scores are cosines"
            raise ValueError(f"--moe-router-init-scale {rule}, got {config.moe_router_init_scale}")

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        return "at most ", most_experts(config)

    @classmethod
    def from_config(cls, place: Place) -> "TopAnyRouter":
        config = place.config
        pool = (config.moe_adapt_experts_every, config.moe_initial_experts)
        return cls(place.model_dim, place.num_experts, max_experts_per_token(config), *pool)

    @classmethod
    def after_update(cls, model: nn.Module) -> None:
        step_expert_pools(model)

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        routing = super().forward(x_TD, ids_T)
        if self.pool.every and self.training and self.counting:
            self.pool.count(routing.rows_per_expert(), x_TD, self._unserved_T)
        return replace(routing, active_E=self.pool.active_E)

    def score(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD, weight_ED = F.normalize(x_TD.to(dtype)), F.normalize(self.weight.to(dtype))
        logits_TE = F.linear(x_TD, weight_ED) / self.temperature
        return logits_TE.masked_fill(~self.pool.active_E, CLOSED)

    def passed(self, logits_TE: Tensor) -> Tensor:
        """(T, E) by how much; above 0 an expert is taken."""
        return torch.sigmoid(logits_TE) - torch.sigmoid(
            self.threshold_E.to(logits_TE.dtype) / self.temperature
        )

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        passes_TE, score_TE = self.passed(logits_TE) > 0, torch.sigmoid(logits_TE)
        # Those that pass before the others; a power of 2 rounds nothing. Last those that are not in use.
        preference_TE = torch.where(passes_TE, score_TE, score_TE * 2.0**-32)
        preference_TE = preference_TE.masked_fill(~self.pool.active_E, -1.0)
        limit = min(self.max_experts_per_token or self.num_experts, self.num_experts)
        expert_TK = by_preference(preference_TE, limit)[1]
        chosen_TK = passes_TE.gather(1, expert_TK)
        self._unserved_T = ~chosen_TK[:, 0]
        chosen_TK[:, 0].fill_(True)
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
        weight_ED, active_E = self.weight.to(probs_TE.dtype), self.pool.active_E.to(probs_TE.dtype)
        direction_ED = F.normalize(weight_ED) * active_E.unsqueeze(1)
        diversity = torch.linalg.norm(direction_ED @ direction_ED.T - torch.diag(active_E))
        loss: Tensor = diversity + torch.linalg.norm(weight_ED, dim=1) @ active_E / active_E.sum()
        return loss

    def to_log(self) -> dict[str, Tensor | float]:
        experts = self.pool.active_E.sum()
        logged: dict[str, Tensor | float] = {
            "learned_threshold": (self.threshold_E.detach() * self.pool.active_E).sum() / experts
        }
        return logged | {"active_experts": experts} if self.pool.every else logged

    def extra_repr(self) -> str:
        limit = self.max_experts_per_token or "none"
        return f"{super().extra_repr()}, max_experts_per_token={limit}, adapt_experts_every={self.pool.every}"


@torch.no_grad()
def step_expert_pools(model: nn.Module) -> None:
    """Add and remove experts in every top-any router of `model`; to be called after each update.

    With torch.distributed the counts of all ranks are added up in one exchange, which all ranks must enter.
    An optimizer's moments of an expert that comes are those it had. One that keeps other copies of the
    parameters, as in half precision, must be told of `weight` and `threshold_E`.
    """
    routers = [module for module in model.modules() if isinstance(module, TopAnyRouter) and module.pool.every]
    if not routers:
        return
    counts = of_all_ranks(torch.cat([router.pool.pop_counts() for router in routers]))
    for router, counts_C in zip(routers, counts.split([r.pool.num_counts for r in routers]), strict=True):
        comes_E, vector_D = router.pool.check(counts_C)
        weight = router.weight
        weight.copy_(torch.where(comes_E.unsqueeze(1), vector_D.to(weight.dtype), weight))
        router.threshold_E.masked_fill_(comes_E, 0.0)
