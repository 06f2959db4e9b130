"""What a model loses and what it computes, on validation data."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.utils import apply_to_sample
from torch import Tensor, nn

from xmoe_fairseq.convert.data import Batches
from xmoe_fairseq.convert.ffn import FeedForward
from xmoe_fairseq.moe import RoutedLayer, Routing, moe_layers, record_routing


@dataclass(frozen=True)
class Quality:
    """Of one model at one setting of its thresholds."""

    thresholds: list[float]  # of each MoE layer
    loss: float  # nats per target token
    flops: float  # of the MoE layers, routers included, over those of the dense FFNs
    experts_per_token: float
    ffn_seconds: float  # of all FFNs, per target token

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def measure_dense(model: nn.Module, ffns: list[FeedForward], batches: Batches) -> Quality:
    loss, seconds = run(model, batches, dense_places(ffns))
    return Quality([], loss, 1.0, 0.0, seconds)


def dense_places(ffns: list[FeedForward]) -> list[tuple[nn.Module, nn.Module]]:
    layers: list[Any] = [ffn.layer for ffn in ffns]
    return [(layer.fc1, layer.fc2) for layer in layers]


def measure_sparse(
    model: nn.Module, batches: Batches, look: Callable[[RoutedLayer, Routing], Any] | None = None
) -> Quality:
    """
    Args:
        look: called with each MoE layer and its routing, batch after batch.
    """
    layers = moe_layers(model)
    with record_routing(model) as records:
        totals = {"flops": 0.0, "flops_dense_ffn": 0.0, "rows": 0.0, "tokens": 0.0}

        def count() -> None:
            """Add up and forget: the records of all batches would fill the memory."""
            for layer, routing in records:
                rows, tokens = routing.token_R.numel(), routing.num_tokens
                totals["flops"] += rows * 4 * layer.model_dim * layer.expert_dim
                totals["flops"] += tokens * layer.router_flops
                totals["flops_dense_ffn"] += tokens * 4 * layer.model_dim * layer.dense_ffn_dim
                totals["rows"] += rows
                totals["tokens"] += tokens
                if look:
                    look(layer, routing)
            records.clear()

        loss, seconds = run(model, batches, [(layer, layer) for layer in layers], count)
    thresholds = [float(layer.router.threshold) for layer in layers]  # type: ignore[arg-type, union-attr]
    flops = totals["flops"] / max(totals["flops_dense_ffn"], 1.0)
    return Quality(thresholds, loss, flops, totals["rows"] / max(totals["tokens"], 1.0), seconds)


def in_turn(
    dense: Any, places: list[tuple[nn.Module, nn.Module]], sparse: Any, batches: Batches, rounds: int = 3
) -> float:
    """The sparse FFNs' seconds over the dense ones', run after each other: the median of a few rounds."""
    sparse_places = [(layer, layer) for layer in moe_layers(sparse)]
    ratios = []
    for _ in range(rounds):
        base = run(dense, batches, places)[1]
        ratios.append(run(sparse, batches, sparse_places)[1] / max(base, 1e-12))  # type: ignore[arg-type]
    return statistics.median(ratios)


def run(
    model: nn.Module, batches: Batches, places: list[tuple[nn.Module, nn.Module]], after_batch: Any = None
) -> tuple[float, float]:
    """Loss in nats, and seconds that passed between the modules of each place; both per target token."""
    pad = batches.task.target_dictionary.pad()
    loss, tokens = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), stopwatch(places) as watch:
        for batch in batches:
            sample = apply_to_sample(lambda tensor: tensor.to(device), batch)
            output = model(**sample["net_input"])
            loss += float(nll(model, output, sample["target"], pad))
            tokens += int(sample["target"].ne(pad).sum())
            if after_batch:
                after_batch()
    return loss / max(tokens, 1), watch["seconds"] / max(tokens, 1)


def nll(model: Any, output: Any, target: Tensor, pad: int) -> Tensor:
    log_probs = model.get_normalized_probs(output, log_probs=True).flatten(0, 1)
    return torch.nn.functional.nll_loss(
        log_probs.float(), target.flatten(), ignore_index=pad, reduction="sum"
    )


@contextmanager
def stopwatch(places: list[tuple[nn.Module, nn.Module]]) -> Iterator[dict[str, float]]:
    """Adds up the time from the start of the first module of a place to the end of its second."""
    watch = {"seconds": 0.0, "since": 0.0}

    def start(*_: Any) -> None:
        watch["since"] = time.perf_counter()

    def stop(*_: Any) -> None:
        watch["seconds"] += time.perf_counter() - watch["since"]

    handles = [first.register_forward_pre_hook(start) for first, _ in places]
    handles += [last.register_forward_hook(stop) for _, last in places]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
