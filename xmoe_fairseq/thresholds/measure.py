"""The one meter: what a model loses, computes and takes on validation data, with any thresholds."""

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from fairseq.utils import apply_to_sample
from torch import nn
from torch.nn.functional import nll_loss
from tqdm import tqdm

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe import RoutingStats, ThresholdRouter, check_finite, moe_layers, record_routing
from xmoe_fairseq.moe.records import fix_thresholds
from xmoe_fairseq.moe.rules import RULES, Rule, rule_named

Place = tuple[nn.Module, nn.Module]  # of an FFN: its first module and its last


@dataclass(frozen=True)
class Quality:
    """Of one model at one setting of its thresholds."""

    thresholds: list[float]  # of each MoE layer; none of a dense model, or as it is
    bits_per_token: float  # loss, per target token
    experts_per_token: float  # on average over layers; 0 of a dense model
    flops: float  # of the MoE layers, routers included, over those of the dense FFNs
    ffn_seconds: float  # of all FFNs, per target token

    @property
    def perplexity(self) -> float:
        return float(2.0 ** min(self.bits_per_token, 1000.0))


def shorten(thresholds: Sequence[float]) -> str:
    texts = [f"{t:.3g}" for t in thresholds]
    return " ".join(texts[:1] if len(set(texts)) == 1 else texts)


class Meter:
    """Runs a model over the same batches with any thresholds, says and remembers what it has measured.

    Args:
        rule: whose thresholds they are.
    """

    def __init__(self, model: nn.Module, batches: Batches, rule: Rule = RULES["mass"]) -> None:
        self.model, self.batches, self.rule = model, batches, rule
        self.places: list[Place] = [(layer, layer) for layer in moe_layers(model)]
        self.known: dict[tuple[float, ...], Quality] = {}

    def by(self, rule: str | None) -> "Meter":
        """The same by another rule; None = by its own."""
        return self if rule in (None, self.rule.name) else Meter(self.model, self.batches, rule_named(rule))

    @property
    def routers(self) -> list[ThresholdRouter]:
        return [layer.router for layer in moe_layers(self.model)]  # type: ignore[misc]

    @property
    def shared_experts(self) -> int:
        """Of each layer."""
        layer: Any = moe_layers(self.model)[0]
        return int(layer.shared_experts)

    @property
    def in_use(self) -> list[float]:
        return [float(router.threshold_in_use) for router in self.routers]

    def use(self, thresholds: Sequence[float]) -> None:
        """None = the model as it is, with any router."""
        if thresholds:
            fix_thresholds(self.model, thresholds, self.rule.name)

    def measure(self, thresholds: Sequence[float]) -> Quality:
        if tuple(thresholds) in self.known:
            return self.known[tuple(thresholds)]
        self.use(thresholds)
        totals: dict[str, Any] = defaultdict(float)
        with record_routing(self.model) as records:

            def count() -> None:
                """Add up and forget: the records of all batches would fill the memory."""
                for layer, routing in records:
                    stats = RoutingStats.of(routing)
                    sums = {**layer.flops(stats), "rows": stats.rows_computed, "tokens": stats.tokens}
                    for name, value in sums.items():
                        totals[name] += value
                records.clear()

            name = f"t {shorten(thresholds)}" if thresholds else "as it is"
            loss, seconds = run(self.model, self.places, self.batches, count, name)
        check_finite(self.model)
        experts = float(totals["rows"]) / max(float(totals["tokens"]), 1.0)
        flops = float(totals["flops"]) / max(float(totals["flops_dense_ffn"]), 1.0)
        quality = self.known[tuple(thresholds)] = Quality(list(thresholds), loss, experts, flops, seconds)
        if not sys.stderr.isatty():  # no bar to see
            print(f"{name}: {loss:.4f} bits, {experts:.3f} experts per token", file=sys.stderr, flush=True)
        return quality

    def timed(
        self, found: Sequence[Quality], base: Quality, run_base: Callable[[Batches], float],
        rounds: int = 3, tokens: int = 4096,
    ) -> list[Quality]:  # fmt: skip
        """The same with `ffn_seconds` that can be compared: all are run in turn, so that a drift of the
        machine's speed meets them alike, and taken as the median of the ratios to `base`.

        Args:
            run_base: seconds of its FFNs per token.
            tokens: in each round.
        """
        few = self.batches.first(tokens)
        ratios: list[list[float]] = [[] for _ in found]
        for _ in range(rounds):
            base_seconds = max(run_base(few), 1e-12)
            for quality, mine in zip(found, ratios, strict=True):
                mine.append(self.seconds(quality.thresholds, few) / base_seconds)
        seconds = [statistics.median(mine) * base.ffn_seconds for mine in ratios]
        return [replace(quality, ffn_seconds=s) for quality, s in zip(found, seconds, strict=True)]

    def seconds(self, thresholds: Sequence[float], batches: Batches) -> float:
        """Of all FFNs, per target token."""
        self.use(thresholds)
        return ffn_seconds(self.model, self.places, batches)


def measure_dense(model: nn.Module, places: list[Place], batches: Batches) -> Quality:
    loss, seconds = run(model, places, batches)
    return Quality([], loss, 0.0, 1.0, seconds)


def ffn_seconds(model: nn.Module, places: list[Place], batches: Batches) -> float:
    """Of all FFNs, per target token."""
    return run(model, places, batches)[1]


def run(
    model: Any, places: list[Place], batches: Batches, after_batch: Any = None, text: str = ""
) -> tuple[float, float]:
    """Loss in bits, and seconds that passed between the modules of each place; both per target token.

    Args:
        text: before a progress bar, which is shown on a terminal; "" = none.
    """
    loss, tokens = 0.0, 0
    pad = batches.task.target_dictionary.pad()
    device = next(model.parameters()).device
    hidden = None if text else True  # None: unless on a terminal
    model.eval()
    with torch.no_grad(), stopwatch(places, device) as watch:
        for batch in tqdm(batches, text, batches.number, leave=False, unit="batch", disable=hidden):
            sample = apply_to_sample(lambda tensor: tensor.to(device), batch)
            output, target = model(**sample["net_input"]), sample["target"].flatten()
            log_probs = model.get_normalized_probs(output, log_probs=True).flatten(0, 1).float()
            loss += float(nll_loss(log_probs, target, ignore_index=pad, reduction="sum"))
            tokens += int(target.ne(pad).sum())
            if after_batch:
                after_batch()
    return loss / math.log(2) / max(tokens, 1), watch["seconds"] / max(tokens, 1)


@contextmanager
def stopwatch(places: list[Place], device: torch.device) -> Iterator[dict[str, float]]:
    """Adds up the time from the start of the first module of a place to the end of its second."""
    watch = {"seconds": 0.0, "since": 0.0}

    def now() -> float:
        if device.type == "cuda":  # which is behind the host
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def start(*_: Any) -> None:
        watch["since"] = now()

    def stop(*_: Any) -> None:
        watch["seconds"] += now() - watch["since"]

    handles = [first.register_forward_pre_hook(start) for first, _ in places]
    handles += [last.register_forward_hook(stop) for _, last in places]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
