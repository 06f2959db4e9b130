"""The one search for t: along a family of thresholds that grow with a single number s.

What a setting computes grows with s. What it loses need not fall: a model takes badly to more experts than it
was trained with.
"""

from collections.abc import Callable
from typing import Protocol

from xmoe_fairseq.thresholds.measure import Meter, Quality

PRECISION = 1 / 1024  # of s
COARSE = 8  # steps in which the loss is followed from below


class Family(Protocol):
    """A threshold for each MoE layer: at s = 0 one expert, at s = 1 all that a token may take."""

    def at(self, s: float) -> list[float]: ...


def bisect(
    holds: Callable[[float], bool], inside: float, outside: float, precision: float = PRECISION
) -> float:
    """The last s on the way from `inside`, where it is taken to hold, to `outside`, where it is not."""
    while abs(outside - inside) > precision:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


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
        """The largest setting that costs no more; None if the least does."""

        def fits(s: float) -> bool:
            return cost(self.at(s)) <= limit

        if fits(1.0):
            return self.at(1.0)
        return self.at(bisect(fits, 0.0, 1.0, self.precision)) if fits(0.0) else None

    def smallest(self, bits: float) -> Quality | None:
        """The smallest setting that loses no more bits per token; None if all do.

        From below in coarse steps to the first that is good enough, then between it and the one before.
        """

        def fits(s: float) -> bool:
            return self.at(s).bits_per_token <= bits

        for step in range(COARSE + 1):
            if fits(s := step / COARSE):
                break
        else:
            return None
        return self.at(bisect(fits, s, s - 1 / COARSE, self.precision) if step else s)
