"""The paper's router: each token takes experts until their mass reaches t; and by other rules of one t."""

from typing import Any

from torch import Tensor, nn

from xmoe_fairseq.moe.budget import Budget, step_budgets
from xmoe_fairseq.moe.native.routing import Chosen, can_choose, choose_experts
from xmoe_fairseq.moe.routers.balance_flags import BALANCE
from xmoe_fairseq.moe.routers.base import Router, by_preference
from xmoe_fairseq.moe.routers.cheap_flags import CHEAP
from xmoe_fairseq.moe.routers.registry import Flag, Place, register_router, routed_target
from xmoe_fairseq.moe.rules import RULES, Rule, rule_named


def max_experts_per_token(config: Any) -> int:
    """Of the flags, shared ones apart; 0 = no limit."""
    limit: int = config.moe_max_experts_per_token
    return max(2 * config.moe_ffn_split - config.moe_shared_experts, 1) if limit == -1 else limit


def target_is_possible(config: Any) -> bool:
    num_experts: int = config.moe_num_experts
    most = min(max_experts_per_token(config) or num_experts, num_experts)
    return config.moe_target_experts_per_token == 0 or 1 <= routed_target(config) <= most


def layer_thresholds(config: Any) -> list[float]:
    """t of each MoE layer; none if they are not given. Raises ValueError if one is no number."""
    given = config.moe_layer_thresholds
    return [float(t) for t in given.split(",")] if given else []


THRESHOLD = 0.9  # the paper's

MOST = Flag(
    "moe_max_experts_per_token", -1, "keep only a token's first choices; 0 = no limit, "
    "-1 = 2 x --moe-ffn-split less --moe-shared-experts, so never more than twice the dense FFN",
    rule="must be -1 (= 2 x --moe-ffn-split), 0 (no limit) or more",
    holds=lambda config: config.moe_max_experts_per_token >= -1,
)  # fmt: skip
FLAGS = (
    Flag(
        "moe_threshold", THRESHOLD, "t or tau of the rule: by mass a token takes experts until their "
        "probabilities reach it; in [0, 1]; 0 = one expert, 1 = all; by probability 1 = one, 0 = all",
        rule="must be in [0, 1]", holds=lambda config: 0 <= config.moe_threshold <= 1,
        unless=("moe_layer_thresholds", "moe_target_experts_per_token"),
    ),
    Flag(
        "moe_threshold_rule", "mass", "a token takes experts until their mass reaches t (mass, the paper's), "
        "every expert of at least the probability tau (probability), or of at least (1 - tau) times that of "
        "its best (relative); the best always",
        rule=f"must be one of {', '.join(RULES)}", holds=lambda config: config.moe_threshold_rule in RULES,
        refused_elsewhere=True,
    ),
    Flag(
        "moe_layer_thresholds", "", "t of each MoE layer instead, the encoder's first, such as 0.4,0.6,0.5",
        refused_elsewhere=True,
    ),
    Flag(
        "moe_target_experts_per_token", 0.0, "in training steer each layer's t, from a low start, so that a "
        "token takes so many experts on average, shared ones too; --moe-threshold counts for nothing; 0 off",
        rule="must be 0 (off), or from 1 to --moe-max-experts-per-token (default: 2s) and --moe-num-experts, "
        "plus --moe-shared-experts",
        holds=target_is_possible, refused_elsewhere=True,
    ),
    MOST,
)  # fmt: skip


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

    description = "XMoE: those that reach a probability of t together"
    takes_ones = takes_normalized = True
    flags = (*FLAGS, *BALANCE, *CHEAP)
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
    def check(cls, config: Any, num_layers: int) -> None:
        given, name = config.moe_layer_thresholds, "--moe-layer-thresholds"
        target, probability = config.moe_target_experts_per_token, config.moe_threshold_rule == "probability"
        if not (given or target) and probability and config.moe_threshold == THRESHOLD:
            others = f"{name} or --moe-target-experts-per-token"
            must = f"must be given with --moe-threshold-rule probability, such as 0.08 (or {others})"
            raise ValueError(f"--moe-threshold {must}: {THRESHOLD} would be one expert")
        if not given:
            return
        if target:
            raise ValueError(f"{name} cannot be combined with --moe-target-experts-per-token, got {given}")
        try:
            thresholds = layer_thresholds(config)
            fits = len(thresholds) == num_layers and all(0 <= t <= 1 for t in thresholds)
        except ValueError:
            fits = False
        if not fits:
            rule = f"must give each of the {num_layers} MoE layers a number in [0, 1]"
            raise ValueError(f"{name} {rule}, got {given}")

    @classmethod
    def from_config(cls, place: Place) -> "ThresholdRouter":
        config, each = place.config, layer_thresholds(place.config)
        threshold = each[place.layer] if each else config.moe_threshold
        limit, target = max_experts_per_token(config), routed_target(config)
        how: dict[str, Any] = {"threshold": threshold, "max_experts_per_token": limit}
        how |= {"target_experts_per_token": target, "rule": config.moe_threshold_rule}
        return cls(place.model_dim, place.num_experts, **how)

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        if config.moe_target_experts_per_token:
            return "about ", routed_target(config)
        most: int = config.moe_num_experts
        return "at most ", min(max_experts_per_token(config) or most, most)

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
        chosen_TK[:, 0] = True
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
