"""The thresholds for a budget of FLOPs, or for a permitted loss, by measuring on validation data."""

from collections.abc import Callable
from typing import Any

from torch import nn

from xmoe_fairseq.convert.data import Batches
from xmoe_fairseq.convert.dense import ConvertError
from xmoe_fairseq.convert.measure import Quality, measure_sparse
from xmoe_fairseq.moe import moe_layers

STEPS = 7  # of bisection: the dial to 1/128
PROBES = (0.25, 0.5, 0.75)  # where one layer's loss is measured, the others computing everything


class Dial:
    """One dial s in [0, 1] for all thresholds: 0 = one expert, 0.5 = `middle`, 1 = all experts.

    Args:
        middle: a threshold for each layer; all 0.5 = the same t = s everywhere.
        measure: of the model with these thresholds; what was measured once is remembered.
    """

    def __init__(self, middle: list[float], measure: Callable[[list[float]], Quality]) -> None:
        self.middle, self.measure = middle, measure
        self.points: dict[float, Quality] = {}

    def thresholds(self, s: float) -> list[float]:
        return [2 * s * m if s <= 0.5 else m + (1 - m) * (2 * s - 1) for m in self.middle]

    def at(self, s: float) -> Quality:
        if s not in self.points:
            self.points[s] = self.measure(self.thresholds(s))
        return self.points[s]

    def for_budget(self, flops: float) -> Quality:
        """The most that costs no more than this share of the dense FFNs. Raises ConvertError if none does."""
        if self.at(1.0).flops <= flops or flops >= 1.0:  # with its router a whole layer costs a little over 1
            return self.at(1.0)
        if (least := self.at(0.0)).flops > flops:
            raise ConvertError(
                f"--budget must be at least {least.flops:.3f}, what one expert per token costs "
                f"(a larger --split costs less), got {flops}"
            )
        return self.at(self.bisect(lambda quality: quality.flops <= flops)[0])

    def for_loss(self, loss: float) -> Quality:
        """The cheapest whose loss is no higher. Raises ConvertError if even all experts lose more."""
        if self.at(1.0).loss > loss:
            raise ConvertError(f"--max-loss: with all experts the loss is {self.at(1.0).loss:.4f} already")
        if self.at(0.0).loss <= loss:
            return self.at(0.0)
        return self.at(self.bisect(lambda quality: quality.loss > loss)[1])

    def bisect(self, below: Callable[[Quality], bool]) -> tuple[float, float]:
        """Two neighbouring settings: `below` holds for the first, not for the second."""
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if below(self.at(middle)) else (low, middle)
        return low, high


def make_dial(model: nn.Module, batches: Batches, per_layer: bool, tick: Callable[[], Any]) -> Dial:
    """
    Args:
        tick: called after each measurement.
    """

    def measure(thresholds: list[float]) -> Quality:
        set_thresholds(model, thresholds)
        quality = measure_sparse(model, batches)
        tick()
        return quality

    layers = len(moe_layers(model))
    if not per_layer or layers == 1:
        return Dial([0.5] * layers, measure)
    return Dial(balance(layers, measure), measure)


def set_thresholds(model: nn.Module, thresholds: list[float]) -> None:
    for layer, threshold in zip(moe_layers(model), thresholds, strict=True):
        layer.router.threshold = threshold  # type: ignore[assignment, union-attr]


def balance(layers: int, measure: Callable[[list[float]], Quality]) -> list[float]:
    """Thresholds at which the next share of FLOPs costs every layer about the same loss.

    Each layer is measured alone at a few thresholds, the others computing everything. Losses are taken to
    add up; then each layer takes the setting of least `loss + price * FLOPs`, which is the cheapest way to
    what they cost together. The price is the one at which that is half of everything.
    """
    whole = measure([1.0] * layers)
    settings: list[list[tuple[float, float, float]]] = []  # of a layer: (threshold, FLOPs saved, loss gained)
    for layer in range(layers):
        tried = [(1.0, 0.0, 0.0)]
        for threshold in PROBES:
            quality = measure([threshold if i == layer else 1.0 for i in range(layers)])
            tried.append((threshold, whole.flops - quality.flops, max(quality.loss - whole.loss, 0.0)))
        settings.append(tried)
    low, high = 0.0, 1e3  # nats per share of FLOPs
    for _ in range(50):
        price = (low + high) / 2
        chosen = [min(tried, key=lambda s: s[2] - price * s[1]) for tried in settings]  # noqa: B023
        if sum(saved for _, saved, _ in chosen) < 0.5 * whole.flops:
            low = price
        else:
            high = price
    chosen = [min(tried, key=lambda s: s[2] - high * s[1]) for tried in settings]
    return [threshold for threshold, _, _ in chosen]
