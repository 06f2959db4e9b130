"""The one search for t: along a family of thresholds that grow with a single number s.

What a setting computes grows with s. What it loses need not fall: a model takes badly to more experts than it
was trained with.
"""

from collections.abc import Callable
from typing import Protocol

from xmoe_fairseq.thresholds.measure import Meter, Quality
from xmoe_fairseq_compat.errors import FlagError

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
