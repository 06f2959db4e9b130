"""The paper's router: each token takes experts until their mass reaches t; and by other rules of one t."""

from typing import Any

from torch import Tensor, nn

from xmoe_fairseq.moe.budget import Budget, step_budgets
from xmoe_fairseq.moe.native.routing import Chosen, can_choose, choose_experts
from xmoe_fairseq.moe.routers.balance_flags import BALANCE
from xmoe_fairseq.moe.routers.base import Router, by_preference
from xmoe_fairseq.moe.routers.cheap_flags import CHEAP
from xmoe_fairseq.moe.routers.registry import Place, register_router
from xmoe_fairseq.moe.routers.threshold_flags import (
    FLAGS,
    THRESHOLD,
    check_thresholds,
    layer_thresholds,
    max_experts_per_token,
    most_experts,
    routed_target,
    settle_thresholds,
)
from xmoe_fairseq.moe.rules import Rule, rule_named


@register_router("threshold")
class ThresholdRouter(Router):
    """A token takes experts in order of probability while the mass before an expert is below t.

    At least one expert always; `threshold=0` is top-1, `threshold=1` is all experts.
    Yang et al. 2024 (XMoE), section 3.2, arXiv 2403.18926. `rule` may be another one of `rules.py`.

    Args:
        threshold: t in [0, 1], of the rule.
        max_experts_per_token: keep only a token's first choices; 0 = no limit. Unlike capacity it
            depends on the token alone, so it is causal and the same in any batch.
        target_experts_per_token: steer t to this average instead (see `budget.py`; it takes a call of
            `step_budgets` after each update); 0 = `threshold` as it is.
        rule: "mass", "probability" (a token takes every expert with p >= t) or "relative" (with
            p >= (1 - t) max p).

    Raises:
        ValueError: one of them is out of range.
    """

    description = "XMoE: those that reach a probability of t together, or each of at least tau"
    takes_ones = takes_normalized = True
    flags = (*FLAGS, *BALANCE, *CHEAP)
    settle = staticmethod(settle_thresholds)
    check = staticmethod(check_thresholds)
    deciding = ("candidates", "limit")
    rule: Rule

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        threshold: float = THRESHOLD,
        max_experts_per_token: int = 0,
        target_experts_per_token: float = 0.0,
        rule: str = "mass",
    ) -> None:
        super().__init__(model_dim, num_experts)
        self.fix(threshold, rule)
        if max_experts_per_token < 0 or max_experts_per_token != int(max_experts_per_token):
            must = "must be 0 (no limit) or a whole number"
            raise ValueError(f"max_experts_per_token {must}, got {max_experts_per_token}")
        self.max_experts_per_token = max_experts_per_token
        target = target_experts_per_token
        if target and not 1 <= target <= self.limit:
            must = f"must be 0 (none) or from 1 to the experts that a token may take, {self.limit}"
            raise ValueError(f"target_experts_per_token {must}, got {target}")
        self.budget = Budget(target, num_experts, rule) if target else None

    @classmethod
    def from_config(cls, place: Place) -> "ThresholdRouter":
        config, each = place.config, layer_thresholds(place.config)
        t, target = each[place.layer] if each else config.moe_threshold, routed_target(config)
        how: dict[str, Any] = {"target_experts_per_token": target} if target else {"threshold": t}
        how |= {"max_experts_per_token": max_experts_per_token(config), "rule": config.moe_threshold_rule}
        return cls(place.model_dim, place.num_experts, **how)

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        target = routed_target(config)
        return ("about ", target) if target else ("at most ", most_experts(config))

    @classmethod
    def after_update(cls, model: nn.Module) -> None:
        step_budgets(model)

    def fix(self, threshold: float, rule: str | None = None) -> None:
        """Take this t from now on, of this rule (None = the present one), and no budget.

        Raises:
            ValueError: t is not in [0, 1]; there is no such rule.
        """
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self.rule = self.rule if rule is None else rule_named(rule)
        self.threshold, self.budget = threshold, None

    @property
    def limit(self) -> int:
        """Experts that a token may take."""
        return min(self.max_experts_per_token or self.num_experts, self.num_experts)

    @property
    def threshold_in_use(self) -> Tensor | float:
        return self.threshold if self.budget is None else self.budget.threshold

    def to_log(self) -> dict[str, Tensor | float]:
        return {"threshold": self.threshold_in_use}

    def candidates(self, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The value by the rule, and the expert, of each choice that a token may take."""
        sorted_TK, expert_TK = by_preference(probs_TE, self.limit)
        return self.rule.value(sorted_TK), expert_TK

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        value_TK, expert_TK = self.candidates(probs_TE)
        if self.budget is None:
            chosen_TK = self.rule.takes(value_TK, self.threshold)
        else:
            costs_TK = expert_TK < self.num_experts - self.num_cheap if self.num_cheap else None
            chosen_TK = self.budget.take(value_TK, self.training and self.counting, costs_TK)
        chosen_TK[:, 0].fill_(True)
        return expert_TK, chosen_TK

    def choose_natively(self, logits_TE: Tensor) -> Chosen | None:
        if not (can_choose(logits_TE) and self.chooses_as(ThresholdRouter)):
            return None
        counting = self.budget if self.training and self.counting else None
        if counting and self.num_cheap:  # C++ takes it that every choice costs the same
            return None
        counts_C = counting.counts(logits_TE.device) if counting else None
        return choose_experts(logits_TE, self.limit, self.threshold_in_use, counts_C, self.rule.name)

    def extra_repr(self) -> str:
        limit = self.max_experts_per_token or "none"
        threshold = self.threshold if self.budget is None else "steered"
        taken = f"rule={self.rule.name}, threshold={threshold}, max_experts_per_token={limit}"
        return f"{super().extra_repr()}, {taken}"
