"""Rules of the threshold router: which of a token's choices, the best first, a threshold lets it take.

    mass         experts until their probabilities p together reach t: Yang et al. 2024 (XMoE), section 3.2,
                 arXiv 2403.18926
    probability  every expert with p >= tau. Of all choices with as many experts on average this one keeps
                 the most probability, and the weights of the outputs are probabilities
    relative     every expert with p >= (1 - tau) max p: after Szatkowski et al. 2024 (D2DMoE),
                 arXiv 2310.04361, whose own tau is our 1 - tau

The first choice is taken by all of them. What is equal to tau is taken; a mass equal to t is enough.
t and tau are in [0, 1]. More is taken the larger t and the tau of `relative` are, and the smaller that of
`probability`. Searches and budgets go by a level instead, with which more is taken by every rule: one expert
at 0, all at 1.
"""

from typing import ClassVar, TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor, float | Tensor)
UNIT = 2.0**-52  # of masses: 2048 whole ones fit into 64 bits, and a sum of E is off by E of them at most


class Rule:
    """What is compared of a choice is its value: (T, K), in the type of p, a token's best choice first.

    C++ has the same, bit by bit (`choose` in native/routing.cpp).
    """

    name: ClassVar[str]

    def value(self, p_TK: Tensor) -> Tensor:
        return p_TK

    def cut(self, threshold: Number) -> Number:
        """What values are compared with."""
        return threshold

    def takes(self, value_TK: Tensor, threshold: float | Tensor) -> Tensor:
        """(T, K) bool; of the first choice nobody asks."""
        return value_TK >= self.cut(threshold)

    def level(self, value_TK: Tensor) -> Tensor:
        """(T, K) in [0, 1]: that from which on the choice is taken."""
        return 1 - value_TK

    def threshold(self, level: Number) -> Number:
        """That of a level."""
        return level

    def start(self, target: float, num_experts: int) -> float:
        """A threshold with which no token takes more than `target` experts, whatever the router."""
        raise NotImplementedError


class Mass(Rule):
    name = "mass"

    def value(self, p_TK: Tensor) -> Tensor:
        """The mass before. Whole numbers add up to the same in any order, where a GPU's sums of fractions
        differ from run to run (torch.use_deterministic_algorithms refuses those)."""
        units_TK = (p_TK.nan_to_num(1.0) / UNIT).long()  # NaN: an overflow on its way to the loss scaler
        return (units_TK.cumsum(dim=1) - units_TK).to(p_TK.dtype) * UNIT

    def takes(self, value_TK: Tensor, threshold: float | Tensor) -> Tensor:
        return (value_TK < threshold) | (threshold >= 1)  # a rounded sum may reach 1 before the last expert

    def level(self, value_TK: Tensor) -> Tensor:
        return value_TK

    def start(self, target: float, num_experts: int) -> float:
        """A token's B best experts have B / E of the probability at least."""
        return int(target) / num_experts


class Probability(Rule):
    name = "probability"

    def level(self, value_TK: Tensor) -> Tensor:
        """By the fourth root: among many experts every p is small, and in a histogram of 1 - p those of a
        router that hardly tells them apart lie in a bin or two (a budget of 4 gave 3.8 of 128 experts, 2.9 of
        512; so it gives 4.0 of either)."""
        return 1 - value_TK.sqrt().sqrt()

    def threshold(self, level: Number) -> Number:
        return (1 - level) ** 4

    def start(self, target: float, num_experts: int) -> float:
        """No more than B experts can have 1 / B each."""
        return 1 / target


class Relative(Rule):
    name = "relative"

    def value(self, p_TK: Tensor) -> Tensor:
        return p_TK / p_TK[:, :1]

    def cut(self, threshold: Number) -> Number:
        return 1 - threshold

    def start(self, target: float, num_experts: int) -> float:
        """The most probable expert, and those that equal it: more than B in a router without any preference,
        for which no threshold would do."""
        return 0.0


RULES: dict[str, Rule] = {rule.name: rule for rule in (Mass(), Probability(), Relative())}


def rule_named(name: str) -> Rule:
    """Raises ValueError."""
    if name not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name}")
    return RULES[name]
