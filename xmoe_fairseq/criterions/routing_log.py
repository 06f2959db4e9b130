"""What is logged about the routing: sums over tokens, by side and layer, and ratios of them.

fairseq adds up tensors of any shape over micro-batches and ranks, and its meters over updates and the
batches of a validation. Only what is shown is divided.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from fairseq import metrics
from fairseq.logging.meters import AverageMeter, MetersDict
from torch import Tensor

from xmoe_fairseq.moe import RoutedLayer, Routing, RoutingStats

SIDES = ("encoder", "decoder")
# Of the ratios those that a log line shows: what a token costs, and whether the load is even.
SHOWN = ("experts_per_token", "flops_vs_dense_ffn", "max_violation")
FLOPS = {"flops", "flops_all_experts", "flops_dense_ffn"}
Records = list[tuple[RoutedLayer, Routing]]


def routing_sums(layers: list[RoutedLayer], records: Records, device: torch.device) -> dict[str, Tensor]:
    """Logging outputs: (L,) or (L, E) for the L layers of each side."""
    logged = {}
    for side in SIDES:
        sums = [layer_sums(layer, records, device) for layer in layers if layer.side == side]
        for name in sums[0] if sums else ():
            logged[f"moe_{side}_{name}"] = torch.stack([own[name] for own in sums])
    return logged


def layer_sums(layer: RoutedLayer, records: Records, device: torch.device) -> dict[str, Tensor]:
    """() or (E,); 0 for a layer that did not run."""
    calls = [RoutingStats.of(routing) for ran, routing in records if ran is layer]
    none = RoutingStats.zeros(layer.num_experts, device, layer.num_cheap)
    stats = reduce(add, calls) if calls else none
    own = {name: value * stats.tokens for name, value in layer.to_log().items()}
    return {**own, **vars(stats), **layer.flops(stats)}


def log_side(side: str, logging_outputs: list[dict[str, Any]]) -> None:
    """Log the sums, and ratios that are taken whenever they are shown: of all that was logged by then."""
    prefix = f"moe_{side}_"
    keys = list(dict.fromkeys(key for log in logging_outputs for key in log if key.startswith(prefix)))
    if not keys:
        return
    totals = on_host([sum(log[key] for log in logging_outputs if key in log) for key in keys])
    sums = {key.removeprefix(prefix): total for key, total in zip(keys, totals, strict=True)}
    if not sums["tokens"].any():
        return
    forget_other_models(prefix, sums)
    for name, total in sums.items():
        metrics.log_scalar_sum(f"_{prefix}{name}", total)  # fairseq does not show what begins with _
    shown = Shown(f"_{prefix}", list(sums))
    of_all = [name for name in RATIOS if name != "cheap_per_token" or sums["rows_cheap"].any()]
    for name in (*of_all, *own_of_routers(sums)):
        log_derived(f"{prefix}{name}", partial(shown.ratio, name))


def forget_other_models(prefix: str, sums: dict[str, Tensor]) -> None:
    """fairseq's default meters last as long as the process: to sums of a model with other layers or another
    number of experts, which was evaluated before in it, nothing can be added."""
    for meters in metrics.get_active_aggregators():
        own = {key: meters[key].sum for key in meters if key.startswith(f"_{prefix}")}
        before = {key: total.shape for key, total in own.items() if torch.is_tensor(total)}
        if any(before.get(f"_{prefix}{name}", total.shape) != total.shape for name, total in sums.items()):
            for key in [key for key in meters if key.removeprefix("_").startswith(prefix)]:
                remove(meters, key)


def on_host(tensors: list[Tensor]) -> list[Tensor]:
    """In one transfer."""
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def log_derived(key: str, value: Callable[[MetersDict], float]) -> None:
    for meters in metrics.get_active_aggregators():
        if isinstance(meters.get(key), AverageMeter):  # of a checkpoint from before these were derived
            remove(meters, key)
    metrics.log_derived(key, value)


def remove(meters: MetersDict, key: str) -> None:
    del meters[key]
    meters.priorities = [entry for entry in meters.priorities if entry[-1] != key]


class Shown:
    """The ratios of a side's meters, taken once for all: fairseq asks for each after every update."""

    def __init__(self, prefix: str, names: list[str]) -> None:
        self.prefix, self.names = prefix, names
        self.tokens: Tensor | None = (
            None  # of which `values` are; a meter has another tensor after each update
        )
        self.values: dict[str, float] = {}

    def ratio(self, name: str, meters: MetersDict) -> float:
        """NaN where nothing has been logged since the meters were reset."""
        tokens = meters[f"{self.prefix}tokens"].sum
        if not torch.is_tensor(tokens):
            return math.nan
        if tokens is not self.tokens:
            self.tokens = tokens
            self.values = ratios({each: meters[f"{self.prefix}{each}"].sum for each in self.names})
        return self.values[name]


# Of the layers that ran, which count alike, and the sums of their FLOPs.
RATIOS: dict[str, Callable[[RoutingStats, dict[str, Tensor]], Tensor]] = {
    "load_balance_loss": lambda stats, flops: stats.load_balance_loss.mean(),
    "z_loss": lambda stats, flops: stats.z_loss.mean(),
    "experts_per_token": lambda stats, flops: stats.rows_computed.sum() / stats.tokens.sum(),
    "cheap_per_token": lambda stats, flops: stats.rows_cheap.sum() / stats.tokens.sum(),
    "flops_vs_all_experts": lambda stats, flops: flops["flops"] / flops["flops_all_experts"],
    "flops_vs_dense_ffn": lambda stats, flops: flops["flops"] / flops["flops_dense_ffn"],
    "dropped_share": lambda stats, flops: 1 - stats.rows_kept.sum() / stats.rows_wanted.sum(),
    "load_cv": lambda stats, flops: stats.load_cv.mean(),
    "max_violation": lambda stats, flops: stats.max_violation.mean(),
    "dead_experts": lambda stats, flops: stats.dead_experts.sum(),
    "router_entropy": lambda stats, flops: stats.entropy.sum() / stats.tokens.sum(),
}


def own_of_routers(sums: dict[str, Tensor]) -> list[str]:
    """What the routers of these layers log beside (`RoutedLayer.to_log`)."""
    return [name for name in sums if name not in RoutingStats.__dataclass_fields__.keys() | FLOPS]


def ratios(sums: dict[str, Tensor]) -> dict[str, float]:
    """What a user sees, of the sums of a side's layers."""
    sums = {name: total[sums["tokens"] > 0] for name, total in sums.items()}
    stats = RoutingStats(**{f.name: sums[f.name] for f in fields(RoutingStats)})
    flops = {name: sums[name].sum() for name in FLOPS}
    values = {name: ratio(stats, flops) for name, ratio in RATIOS.items()}
    own = {name: (sums[name] / stats.tokens).mean() for name in own_of_routers(sums)}
    shown = {name: round(value.item(), 4) for name, value in values.items()}
    return shown | {name: float(f"{value.item():.4g}") for name, value in own.items()}  # may be of any size


def layer_stats(layers: list[RoutedLayer], meters: MetersDict | None) -> dict[str, RoutingStats]:
    """By the layer's name, of all that was logged since the meters were reset; of layers that ran."""
    found = {}
    for side in SIDES:
        names = [layer.name for layer in layers if layer.side == side]
        keys = {f.name: f"_moe_{side}_{f.name}" for f in fields(RoutingStats)}
        sums = {name: meters[key].sum for name, key in keys.items() if meters and key in meters}
        # a criterion that logs none, or nothing as yet, or not all in the checkpoint of an earlier version
        if len(sums) < len(keys) or not all(map(torch.is_tensor, sums.values())):
            continue
        for index, name in enumerate(names):
            stats = RoutingStats(**{key: total[index] for key, total in sums.items()})
            if stats.tokens:
                found[name] = stats
    return found
