"""What the MoE layers have cost: the line after fairseq-generate, -eval-lm, -validate and -interactive."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from xmoe_fairseq.moe import RoutedLayer, check_finite, moe_layers
from xmoe_fairseq.moe.stats import RowCounts

SECONDS = "seconds.json"  # of scripts/benchmark_checkpoints.sh


class CostMeter:
    """Counts what the MoE layers of a model compute while it is entered: every call on tokens that are no
    padding, those of a beam's hypotheses and of a context that is read again too.

    The counts are numbers that the host knows, so that a GPU is not waited for but once, at the end: whether
    all numbers were finite, before somebody prints what came of them.
    """

    def __init__(self, model: nn.Module, time: str = "") -> None:
        self.model, self.layers, self.time = model, moe_layers(model), time
        self.sums: dict[str, Counter[str]] = {layer.side: Counter() for layer in self.layers}

    def __enter__(self) -> None:
        self.handles = [layer.register_forward_hook(self.count) for layer in self.layers]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        if error[0] in (None, AssertionError):  # as fairseq's search of what is not finite ends
            check_finite(self.model)

    def count(self, layer: RoutedLayer, _: Any, output: Any) -> None:
        routing = output[1]
        counts = RowCounts.of(routing)
        self.sums[layer.side].update(
            tokens=counts.tokens, rows=counts.rows_computed, cheap=routing.rows_cheap, **layer.flops(counts)
        )

    def line(self) -> str:
        """Of all ranks, each of which calls this. Sides that cost the same are shown as one."""
        sides = {side: sums for side, sums in add_ranks(self.sums).items() if sums["tokens"]}
        if not sides:
            return "MoE: no token was routed"
        experts = {side: f"{sums['rows'] / sums['tokens']:.2f}" for side, sums in sides.items()}
        flops = {side: f"{flops_share(sums):.2f}" for side, sums in sides.items()}
        cheap = {side: f"{sums['cheap'] / sums['tokens']:.2f}" for side, sums in sides.items()}
        alike = all(len({*values.values()}) == 1 for values in (experts, flops, cheap))
        of = f" of {self.layers[0].num_experts + getattr(self.layers[0], 'shared_experts', 0)}"
        beside = f" and {by_side(cheap, alike)} cheap ones" if self.layers[0].num_cheap else ""
        together = "" if alike else f" (together {flops_share(sum(sides.values(), Counter())):.2f})"
        return (
            f"MoE: {by_side(experts, alike)}{of} experts{beside} per token, "
            f"{by_side(flops, alike)} of the dense FFN's FLOPs{together}{self.time}"
        )


def by_side(values: Mapping[str, str], alike: bool) -> str:
    if alike:
        return next(iter(values.values()))
    return " and ".join(f"{value} ({side})" for side, value in values.items())


def flops_share(sums: Counter[str]) -> float:
    return sums["flops"] / sums["flops_dense_ffn"]


def add_ranks(sums: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
    if not dist.is_initialized():
        return sums
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, sums)
    return {side: sum((own[side] for own in each), Counter()) for side in sums}


def meter_of(model: nn.Module, path: str, overrides: Mapping[str, Any]) -> CostMeter | None:
    """None for a model without MoE layers."""
    asked = {**overrides, **(overrides.get("model") or {})}
    as_measured = not any(name.startswith("moe_") for name in asked)
    return CostMeter(model, measured_time(Path(path)) if as_measured else "") if moe_layers(model) else None


def measured_time(checkpoint: Path) -> str:
    """What was measured, since it was written, of its FFNs' time over a dense model's; "" if nothing was."""
    for file in (checkpoint.with_suffix(".json"), checkpoint.with_name(SECONDS)):
        try:
            if file.stat().st_mtime < checkpoint.stat().st_mtime:
                continue
            ratio = time_ratio(json.loads(file.read_text(encoding="utf-8")), checkpoint.name)
        except (OSError, ValueError, KeyError, TypeError):  # none, or another program's
            continue
        if ratio is not None:
            return f", {ratio:.2f} of its time ({file.name})"
    return ""


def time_ratio(record: Any, checkpoint: str) -> float | None:
    """Of a report of xmoe-convert (`thresholds/report.py`), or SECONDS; None if it is of something else."""
    if "rows" in record:
        made = next(iter(record["rows"].values()))
        is_dense = record["reference"]["name"] == "dense"
        return made["ffn_seconds"] / record["reference"]["ffn_seconds"] if is_dense else None
    return record["ratio"] if record["checkpoint"] == checkpoint and record["to_dense_ffn"] else None
