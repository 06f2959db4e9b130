"""The one search for t: along a family of thresholds that go with a single number s, the level.

What a setting computes grows with s. What it loses need not fall: a model takes badly to more experts than it
was trained with.
"""

from collections.abc import Callable
from typing import NamedTuple

from xmoe_fairseq.moe.rules import RULES, Rule
from xmoe_fairseq.thresholds.measure import Meter, Quality
from xmoe_fairseq_compat.errors import FlagError

PRECISION = 1 / 1024  # of s
COARSE = 8  # steps in which the loss is followed from below
PROBES = (0.25, 0.5, 0.75)  # levels at which one layer's loss is measured, the others computing everything
PRICES = (1e3, 0.0)  # bits per share of FLOPs


class Family(NamedTuple):
    """A threshold for each MoE layer: at s = 0 one expert, at s = 1 all that a token may take.

    Levels go in a straight line from 0 to `middle`, at s = 0.5, and on to 1; with 0.5 everywhere they are s.
    """

    middle: list[float]
    rule: Rule = RULES["mass"]

    def at(self, s: float) -> list[float]:
        levels = [2 * s * m if s <= 0.5 else m + (1 - m) * (2 * s - 1) for m in self.middle]
        return [self.rule.threshold(level) for level in levels]


def same_everywhere(meter: Meter) -> Family:
    return Family([0.5] * len(meter.routers), meter.rule)


def bisect(
    holds: Callable[[float], bool], inside: float, outside: float, precision: float = PRECISION
) -> float:
    """The last s on the way from `inside`, where it is taken to hold, to `outside`, where it is not."""
    while abs(outside - inside) > precision:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def equal_loss(meter: Meter) -> Family:
    """A family along which the next share of FLOPs costs every layer about the same loss.

    Each layer is measured alone at a few levels, the others computing everything. Losses are taken to
    add up; then each layer takes the setting of least `loss + price * FLOPs`, which is the cheapest way to
    what they cost together. The price is the one at which that is half of everything.
    """
    layers = len(meter.routers)
    if layers == 1:
        return same_everywhere(meter)
    whole = meter.measure(same_everywhere(meter).at(1.0))
    settings: list[list[tuple[float, float, float]]] = []  # of a layer: (level, FLOPs saved, loss gained)
    for layer in range(layers):
        tried = [(1.0, 0.0, 0.0)]
        for level in PROBES:
            here = Family([level if i == layer else 1.0 for i in range(layers)], meter.rule)
            quality = meter.measure(here.at(0.5))
            gained = max(quality.bits_per_token - whole.bits_per_token, 0.0)
            tried.append((level, whole.flops - quality.flops, gained))
        settings.append(tried)

    def chosen(price: float) -> list[tuple[float, float, float]]:
        return [min(tried, key=lambda s: s[2] - price * s[1]) for tried in settings]

    def is_half(price: float) -> bool:
        return sum(saved for _, saved, _ in chosen(price)) >= 0.5 * whole.flops

    middle = [level for level, _, _ in chosen(bisect(is_half, *PRICES, precision=1e-12))]
    return Family(middle, meter.rule)


class Search:
    """Settings of a family, measured when they are asked for, and remembered."""

    def __init__(self, meter: Meter, family: Family, precision: float = PRECISION) -> None:
        self.meter, self.family, self.precision = meter, family, precision
        self.points: dict[float, Quality] = {}

    def at(self, s: float) -> Quality:
        if s not in self.points:
            self.points[s] = self.meter.measure(self.family.at(s))
        return self.points[s]

    def largest(self, cost: Callable[[Quality], float], limit: float) -> Quality | None:
        """The largest setting that costs no more than the limit; None if even the least costs more."""

        def fits(s: float) -> bool:
            return cost(self.at(s)) <= limit

        if fits(1.0):
            return self.at(1.0)
        return self.at(bisect(fits, 0.0, 1.0, self.precision)) if fits(0.0) else None

    def smallest(self, bits: float) -> Quality:
        """The smallest setting that loses no more bits per token.

        From below in coarse steps to the first that is good enough, then between it and the one before.

        Raises:
            FlagError: all lose more.
        """

        def fits(s: float) -> bool:
            return self.at(s).bits_per_token <= bits

        first = next((step / COARSE for step in range(COARSE + 1) if fits(step / COARSE)), None)
        if first is None:
            least = min(quality.bits_per_token for quality in self.points.values())
            raise FlagError(
                f"--max-loss: no t has a loss of {bits:.4f} bits per token or less; the least is {least:.4f}"
            )
        return self.at(bisect(fits, first, first - 1 / COARSE, self.precision) if first else first)
