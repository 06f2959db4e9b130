"""Families of thresholds for the search: the same t in all layers, or one for each."""

from typing import NamedTuple

import torch

from xmoe_fairseq.moe import Budget, RoutedLayer, Routing, moe_layers
from xmoe_fairseq.moe.budget import threshold_for
from xmoe_fairseq.thresholds.measure import Meter
from xmoe_fairseq.thresholds.search import bisect

PROBES = (0.25, 0.5, 0.75)  # where one layer's loss is measured, the others computing everything
PRICES = (1e3, 0.0)  # bits per share of FLOPs
ROUNDS = 6  # a layer's t changes what the layers above it see
CLOSE = 1 / 2048  # two thresholds that are one


class Through(NamedTuple):
    """In a straight line from 0 to `middle`, at s = 0.5, and on to 1; with 0.5 everywhere t = s."""

    middle: list[float]

    def at(self, s: float) -> list[float]:
        return [2 * s * m if s <= 0.5 else m + (1 - m) * (2 * s - 1) for m in self.middle]


def same_everywhere(meter: Meter) -> Through:
    return Through([0.5] * len(meter.routers))


class EqualExperts:
    """All layers take the same number of experts per token on average, which grows evenly with s."""

    def __init__(self, meter: Meter, start: list[float]) -> None:
        self.meter, self.thresholds = meter, start
        self.limit = meter.routers[0].limit

    def setting(self, experts: float) -> float:
        """s at which a token takes so many."""
        return (experts - 1) / max(self.limit - 1, 1)

    def at(self, s: float) -> list[float]:
        """A layer's t depends on those below it only, so from the lowest up they come to rest."""
        experts = 1 + s * (self.limit - 1)
        for _ in range(ROUNDS):
            wanted = self.wanted(experts, self.thresholds)
            if max(abs(t - new) for t, new in zip(self.thresholds, wanted, strict=True)) < CLOSE:
                break
            self.thresholds = wanted
        return self.thresholds

    def wanted(self, experts: float, thresholds: list[float]) -> list[float]:
        """The t of each layer that would have taken so many, where these thresholds are in use."""
        layers = moe_layers(self.meter.model)
        counters = {layer: Budget(experts, layer.num_experts) for layer in layers}

        def count(layer: RoutedLayer, routing: Routing) -> None:
            counters[layer].count(layer.router.candidates(routing.probs_TE)[0])  # type: ignore[operator, union-attr]

        self.meter.measure(thresholds, count)
        counts_LC = torch.stack([counter.pop_counts() for counter in counters.values()])
        target_L = torch.full((len(layers),), experts, dtype=torch.float64)
        return [round(t, 6) for t in threshold_for(counts_LC, target_L).tolist()]


def equal_loss(meter: Meter) -> Through:
    """A family along which the next share of FLOPs costs every layer about the same loss.

    Each layer is measured alone at a few thresholds, the others computing everything. Losses are taken to
    add up; then each layer takes the setting of least `loss + price * FLOPs`, which is the cheapest way to
    what they cost together. The price is the one at which that is half of everything.
    """
    layers = len(meter.routers)
    if layers == 1:
        return same_everywhere(meter)
    whole = meter.measure([1.0] * layers)
    settings: list[list[tuple[float, float, float]]] = []  # of a layer: (threshold, FLOPs saved, loss gained)
    for layer in range(layers):
        tried = [(1.0, 0.0, 0.0)]
        for threshold in PROBES:
            quality = meter.measure([threshold if i == layer else 1.0 for i in range(layers)])
            gained = max(quality.bits_per_token - whole.bits_per_token, 0.0)
            tried.append((threshold, whole.flops - quality.flops, gained))
        settings.append(tried)

    def chosen(price: float) -> list[tuple[float, float, float]]:
        return [min(tried, key=lambda s: s[2] - price * s[1]) for tried in settings]

    def is_half(price: float) -> bool:
        return sum(saved for _, saved, _ in chosen(price)) >= 0.5 * whole.flops

    return Through([threshold for threshold, _, _ in chosen(bisect(is_half, *PRICES, precision=1e-12))])
