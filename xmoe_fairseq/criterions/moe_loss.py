"""What both criterions add to fairseq's own: the auxiliary losses and what to log about the routing."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from fairseq import metrics
from fairseq.dataclass import FairseqDataclass
from torch import Tensor, nn

from xmoe_fairseq.moe import MoELayer, Routing, RoutingStats, ThresholdRouter, moe_layers, record_routing
from xmoe_fairseq_compat.errors import FlagError

SIDES = ("encoder", "decoder")
STATS = tuple(f.name for f in fields(RoutingStats))
FLOPS = ("flops", "flops_all_experts", "flops_dense_ffn")
SUMS = (*STATS, *FLOPS, "threshold", "threshold_calls")  # the last two for threshold routers only, else 0


@dataclass
class MoELossConfig(FairseqDataclass):
    moe_loss_coeff: float = field(
        default=0.01,
        metadata={"help": "weight of the load-balance loss, per MoE layer and unit of sample size"},
    )
    moe_z_loss_coeff: float = field(
        default=0.0, metadata={"help": "weight of the router z-loss, per MoE layer and unit of sample size"}
    )


class MoELossMixin:
    """Put before one of fairseq's criterions.

    The loss to minimise is `task_loss + sample_size * sum over MoE layers (coeff * load_balance + z_coeff *
    z_loss)`. What is logged as `loss` stays the task's own, so that it can be compared with a dense model's.
    """

    def set_coefficients(self, moe_loss_coeff: float, moe_z_loss_coeff: float) -> None:
        for flag, value in (("--moe-loss-coeff", moe_loss_coeff), ("--moe-z-loss-coeff", moe_z_loss_coeff)):
            if not 0 <= value < float("inf"):
                raise FlagError(f"{flag} must be 0 or more, got {value}")
        self.moe_loss_coeff = moe_loss_coeff
        self.moe_z_loss_coeff = moe_z_loss_coeff

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict]:
        """Returns loss, sample size and logging outputs (sums). With reduce=False the loss is per token, and
        the auxiliary losses, which belong to no token, are left out."""
        with record_routing(model) as records:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        if reduce and records:
            loss = loss + sample_size * self.auxiliary_loss(routing for _, routing in records)
        # The sides that have experts, not those that ran: LayerDrop leaves layers out, and ranks must log the
        # same keys for their sums to be reduced together.
        for side in sorted({side_of(layer) for layer in moe_layers(model)}):
            ran = [(layer, routing) for layer, routing in records if side_of(layer) == side]
            logging_output.update(side_sums(side, ran, loss.device))
        return loss, sample_size, logging_output

    def auxiliary_loss(self, routings: Iterable[Routing]) -> Tensor | float:
        """A loss that does not count is left out: 0 times one that has overflowed would be NaN."""
        terms = [
            coefficient * loss
            for routing in routings
            for coefficient, loss in (
                (self.moe_loss_coeff, routing.load_balance_loss),
                (self.moe_z_loss_coeff, routing.z_loss),
            )
            if coefficient
        ]
        return torch.stack(terms).sum() if terms else 0.0

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        super().reduce_metrics(logging_outputs)
        for side in SIDES:
            log_side(side, logging_outputs)


def layer_flops(layer: MoELayer, stats: RoutingStats) -> dict[str, Tensor]:
    """Multiply-adds x 2 of the matrix products in a forward pass, router included.

    The authors count the experts only; the router is what the saving costs.
    """
    per_row = 4 * layer.model_dim * layer.expert_dim
    router = stats.tokens * layer.router_flops
    return {
        "flops": router + layer.rows_computed(stats) * per_row,
        "flops_all_experts": router + stats.tokens * (layer.num_experts * per_row),
        "flops_dense_ffn": stats.tokens * (4 * layer.model_dim * layer.dense_ffn_dim),
    }


def side_of(layer: MoELayer) -> str:
    return layer.name.split(".")[0]


def side_sums(side: str, records: list[tuple[MoELayer, Routing]], device: torch.device) -> dict[str, Tensor]:
    """Logging outputs of one side, as sums."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = {f"moe_{side}_{name}": zero for name in SUMS}
    for layer, routing in records:
        stats = RoutingStats.of(routing)
        values = {name: getattr(stats, name) for name in STATS} | layer_flops(layer, stats)
        router = getattr(layer, "router", None)  # a peer's layer keeps its own elsewhere
        if isinstance(router, ThresholdRouter):
            values |= {"threshold_calls": stats.calls, "threshold": router.threshold_in_use * stats.calls}
        for name, value in values.items():
            sums[f"moe_{side}_{name}"] = sums[f"moe_{side}_{name}"] + value
    return sums


def log_side(side: str, logging_outputs: list[dict[str, Any]]) -> None:
    """Divide the sums once, after they were added over ranks and micro-batches."""
    totals = {name: sum(log.get(f"moe_{side}_{name}", 0) for log in logging_outputs) for name in SUMS}
    # One transfer to the host for all of them.
    numbers = torch.stack([torch.as_tensor(total, dtype=torch.float64) for total in totals.values()]).tolist()
    totals = dict(zip(totals, numbers, strict=True))
    calls, tokens = totals["calls"], totals["tokens"]
    if not tokens:
        return
    shares = {
        "load_balance_loss": (totals["load_balance_loss"] / calls, calls),
        "z_loss": (totals["z_loss"] / calls, calls),
        "experts_per_token": (totals["rows_kept"] / tokens, tokens),
        "flops_vs_all_experts": (totals["flops"] / totals["flops_all_experts"], tokens),
        "flops_vs_dense_ffn": (totals["flops"] / totals["flops_dense_ffn"], tokens),
        "dropped_share": (1 - totals["rows_kept"] / totals["rows_wanted"], totals["rows_wanted"]),
        "load_cv": (totals["load_cv"] / calls, calls),
        "router_entropy": (totals["entropy"] / tokens, tokens),
    }
    if calls := totals["threshold_calls"]:
        shares["threshold"] = (totals["threshold"] / calls, calls)
    for name, (value, weight) in shares.items():
        metrics.log_scalar(f"moe_{side}_{name}", value, weight, round=4)
