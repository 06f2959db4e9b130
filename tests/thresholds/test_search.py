"""The search and its families, on costs and losses made so that the answer is known."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from xmoe_fairseq.moe.rules import RULES
from xmoe_fairseq.thresholds.checkpoint import settings_for
from xmoe_fairseq.thresholds.measure import Meter, Quality
from xmoe_fairseq.thresholds.search import Search, bisect, equal_loss, same_everywhere
from xmoe_fairseq_compat.errors import FlagError


def falling(thresholds: list[float]) -> Quality:
    """Costs a layer t of its FLOPs; what is left out of layer 0 costs ten times the loss of layer 1."""
    loss = 2 + sum(weight * (1 - t) ** 2 for weight, t in zip((1.0, 0.1), thresholds, strict=True))
    return Quality(thresholds, loss, 1.0, sum(thresholds) / len(thresholds) + 0.01, 1.0)


def two_layers(measure: Any = falling, rule: str = "mass") -> Any:
    """A meter."""
    return SimpleNamespace(measure=measure, routers=[None, None], rule=RULES[rule])


def flops(quality: Quality) -> float:
    return quality.flops


@pytest.mark.parametrize("ends, last", [((0.0, 1.0), 0.296875), ((1.0, 0.0), 0.3125)])
def test_bisection_ends_at_the_last_setting_that_holds(ends: tuple[float, float], last: float) -> None:
    assert bisect(lambda s: (s <= 0.3) == (ends[0] < 0.3), *ends, precision=1 / 64) == last


def test_the_search_finds_a_budget_and_a_loss() -> None:
    search = Search(two_layers(), same_everywhere(two_layers()))
    assert 0.3 - 1 / 1024 < search.largest(flops, 0.3).flops <= 0.3
    assert 2.4 - 1 / 512 < search.smallest(2.4).bits_per_token <= 2.4
    assert search.largest(flops, 1.01).thresholds == [1.0, 1.0]
    assert search.smallest(5.0).thresholds == [0.0, 0.0]
    assert search.largest(flops, 0.005) is None
    with pytest.raises(FlagError, match="--max-loss: no t has a loss of 1.9.* or less; the least is 2.0000"):
        search.smallest(1.9)


def test_a_loss_that_rises_again_is_followed_from_below() -> None:
    """Good enough from 0.3 to 0.4 only: neither end says so."""

    def dip(thresholds: list[float]) -> Quality:
        return Quality(thresholds, abs(thresholds[0] - 0.35), 1.0, thresholds[0], 1.0)

    found = Search(two_layers(dip), same_everywhere(two_layers())).smallest(0.05)
    assert 0.3 <= found.thresholds[0] < 0.3 + 1 / 1024


def test_layers_that_the_loss_minds_keep_more() -> None:
    meter = two_layers()
    family = equal_loss(meter)
    assert family.at(0.5)[0] > family.at(0.5)[1]
    own, alike = (Search(meter, each).largest(flops, 0.5) for each in (family, same_everywhere(meter)))
    assert own.bits_per_token < alike.bits_per_token


def test_by_probability_more_is_computed_the_lower_tau_is() -> None:
    def rising(thresholds: list[float]) -> Quality:
        return replace(falling([1 - t**0.25 for t in thresholds]), thresholds=thresholds)

    meter = two_layers(rising, "probability")
    alike, own = (Search(meter, family(meter)) for family in (same_everywhere, equal_loss))
    assert alike.largest(flops, 1.01).thresholds == [0.0, 0.0]
    assert alike.largest(flops, 0.01).thresholds == [1.0, 1.0]
    half, other = (search.largest(flops, 0.51) for search in (alike, own))
    assert half.thresholds == pytest.approx([1 / 16] * 2, abs=1e-3)
    assert other.thresholds[0] < other.thresholds[1] and other.bits_per_token < half.bits_per_token


def test_settings_are_fixed_thresholds_without_a_budget() -> None:
    fixed = {"moe_target_experts_per_token": 0.0, "moe_threshold_rule": "mass", "moe_threshold": 0.5}
    assert settings_for([0.5, 0.5], "mass") == {**fixed, "moe_layer_thresholds": ""}
    fixed |= {"moe_threshold_rule": "relative", "moe_threshold": None}
    assert settings_for([0.1, 0.5], "relative") == {**fixed, "moe_layer_thresholds": "0.1,0.5"}


def test_a_drift_of_the_machine_meets_all_that_is_timed() -> None:
    batches = SimpleNamespace(first=lambda tokens: tokens)
    meter, speed = Meter(nn.Module(), batches), iter([1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 2.0, 2.0, 2.0])
    meter.seconds = lambda thresholds, _: thresholds[0] * next(speed)
    found = [Quality([t], 1.0, 1.0, 1.0, 99.0) for t in (1.0, 3.0)]
    base = Quality([], 1.0, 0.0, 1.0, 0.5)
    timed = meter.timed(found, base, lambda _: 2.0 * next(speed))
    assert [quality.ffn_seconds for quality in timed] == pytest.approx([0.25, 0.75])
