"""The flags of the threshold router: a fixed t, t of each layer, or a budget that t is steered to."""

from typing import Any

from xmoe_fairseq.moe.routers.registry import Flag
from xmoe_fairseq.moe.rules import RULES

THRESHOLD = 0.9  # the paper's
AUTO, DEFAULT_BUDGET = "auto", -1.0
FIXED_RULE = "mass"  # the paper's
STEERED_RULE = "probability"  # the best at equal FLOPs: docs/departures.md


def max_experts_per_token(config: Any) -> int:
    """Of the flags, shared ones apart; 0 = no limit."""
    limit: int = config.moe_max_experts_per_token
    return max(2 * config.moe_ffn_split - config.moe_shared_experts, 1) if limit == -1 else limit


def most_experts(config: Any) -> int:
    """That a token may take, shared ones apart."""
    num_experts: int = config.moe_num_experts
    return min(max_experts_per_token(config) or num_experts, num_experts)


def routed_target(config: Any) -> float:
    """What --moe-target-experts-per-token leaves to a router: shared experts count in it. 0 = no target."""
    target: float = config.moe_target_experts_per_token
    return target - config.moe_shared_experts if target else 0.0


def target_is_possible(config: Any) -> bool:
    off_or_default = config.moe_target_experts_per_token in (0, DEFAULT_BUDGET)
    return off_or_default or 1 <= routed_target(config) <= most_experts(config)


def settle_thresholds(config: Any) -> dict[str, Any]:
    """What the flags stand for: t (None = steered, or of each layer), its rule, and the budget (0 = none).

    Without t a budget of s/2 experts, half of the dense FFN's FLOPs; at least one beside the shared ones, and
    no more than a token may take.
    """
    t, rule = config.moe_threshold, config.moe_threshold_rule
    target, is_fixed = config.moe_target_experts_per_token, t is not None or config.moe_layer_thresholds
    if target == DEFAULT_BUDGET:
        shared, half = config.moe_shared_experts, config.moe_ffn_split / 2
        target = 0.0 if is_fixed else shared + min(max(half - shared, 1.0), most_experts(config))
    rule = (STEERED_RULE if target else FIXED_RULE) if rule == AUTO else rule
    if not (is_fixed or target) and rule == FIXED_RULE:
        t = THRESHOLD
    return {"moe_threshold": t, "moe_threshold_rule": rule, "moe_target_experts_per_token": target}


def layer_thresholds(config: Any) -> list[float]:
    """t of each MoE layer; none if they are not given. Raises ValueError if one is no number."""
    given = config.moe_layer_thresholds
    return [float(t) for t in given.split(",")] if given else []


def check_thresholds(config: Any, num_layers: int) -> None:
    """
    Args:
        config: settled.

    Raises:
        ValueError: several of them, or none; not a threshold for each of the MoE layers.
    """
    one, each, budget = "--moe-threshold", "--moe-layer-thresholds", "--moe-target-experts-per-token"
    t, given, target = config.moe_threshold, config.moe_layer_thresholds, config.moe_target_experts_per_token
    if t is not None and (given or target):
        other = f"{each} {given}" if given else f"{budget} {target:g}"
        raise ValueError(f"{one} cannot be combined with {other}, got {t}")
    if given and target:
        raise ValueError(f"{each} cannot be combined with {budget}, got {given}")
    if t is None and not (given or target):
        rule = f"--moe-threshold-rule {config.moe_threshold_rule}"
        raise ValueError(f"{one} must be given with {rule} and {budget} 0; {THRESHOLD} is for {FIXED_RULE}")
    try:
        thresholds = layer_thresholds(config)
        fits = not given or len(thresholds) == num_layers and all(0 <= t <= 1 for t in thresholds)
    except ValueError:
        fits = False
    if not fits:
        rule = f"must give each of the {num_layers} MoE layers a number in [0, 1]"
        raise ValueError(f"{each} {rule}, got {given}")


MOST = Flag(
    "moe_max_experts_per_token", -1, "keep only a token's first choices; 0 = no limit, "
    "-1 = 2 x --moe-ffn-split less --moe-shared-experts, so never more than twice the dense FFN",
    rule="must be -1 (= 2 x --moe-ffn-split), 0 (no limit) or more",
    holds=lambda config: config.moe_max_experts_per_token >= -1,
)  # fmt: skip
FLAGS = (
    Flag(
        "moe_threshold", None, "a fixed t or tau of the rule, in [0, 1], in the place of a budget: by mass a "
        "token takes experts until their probabilities reach it; 0 = one expert, 1 = all; by probability "
        "1 = one, 0 = all",
        rule="must be in [0, 1]",
        holds=lambda config: config.moe_threshold is None or 0 <= config.moe_threshold <= 1,
        unless=("moe_layer_thresholds", "moe_target_experts_per_token"),
    ),
    Flag(
        "moe_threshold_rule", AUTO, "a token takes experts until their mass reaches t (mass, the paper's), "
        "every expert of at least the probability tau (probability), or of at least (1 - tau) times that of "
        f"its best (relative); the best always; auto = {FIXED_RULE} with a fixed t, {STEERED_RULE} with a "
        "budget",
        rule=f"must be one of {', '.join([AUTO, *RULES])}",
        holds=lambda config: config.moe_threshold_rule in (AUTO, *RULES),
        refused_elsewhere=True, idle=(FIXED_RULE,),
    ),
    Flag(
        "moe_layer_thresholds", "", "t of each MoE layer instead, the encoder's first, such as 0.4,0.6,0.5",
        refused_elsewhere=True, unless=("moe_threshold", "moe_target_experts_per_token"),
    ),
    Flag(
        "moe_target_experts_per_token", DEFAULT_BUDGET, "in training steer each layer's t, from a low start, "
        "so that a token takes so many experts on average, shared ones too; -1 = half of --moe-ffn-split, so "
        "half of the dense FFN's FLOPs, unless t is given; 0 = off, so the paper's t if none is given",
        rule="must be -1 (half of --moe-ffn-split), 0 (off), or from 1 to --moe-max-experts-per-token "
        "(default: 2s) and --moe-num-experts, plus --moe-shared-experts",
        holds=target_is_possible, refused_elsewhere=True, idle=(0,),
        unless=("moe_threshold", "moe_layer_thresholds"),
    ),
    MOST,
)  # fmt: skip
