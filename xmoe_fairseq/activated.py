"""How many of a model's parameters a token meets: those that all tokens share, shared experts among
them, and the experts it takes."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from xmoe_fairseq.flags import settled_config
from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.moe.routers.registry import registered_routers


def describe(shared: int, num_experts: Sequence[int], expert_sizes: Sequence[int], model_cfg: Any) -> str:
    """One line: shared + experts per token x one expert, summed over the MoE layers.

    Args:
        shared: parameters outside the experts.
        num_experts: of each MoE layer.
        expert_sizes: parameters of one expert, of each MoE layer.
        model_cfg: the flags, which say how many experts a token takes, or at most.
    """
    total = shared + sum(n * size for n, size in zip(num_experts, expert_sizes, strict=True))
    one, beside = sum(expert_sizes), f"of {total:,}"
    planned = planned_experts(model_cfg)
    if planned is None:
        return f"activated parameters per token: {shared:,} shared + experts per token x {one:,}, {beside}"
    exactly, experts = planned
    sum_ = f"{shared:,} shared + {experts:g} x {one:,}"
    return f"activated parameters per token: {exactly}{shared + round(experts * one):,} ({sum_}), {beside}"


def planned_experts(model_cfg: Any) -> tuple[str, float] | None:
    """See `RouterKind`; None also for a router that is not registered here."""
    try:
        config = settled_config(model_cfg)
        kind = registered_routers().get(config.moe_router)
        return kind.planned_experts(config) if kind else None
    except (TypeError, ValueError):  # a damaged checkpoint's, which was not asked to build a model
        return None


def describe_model(model: nn.Module, model_cfg: Any) -> str:
    """Of a model with all experts here, or some of each layer's on every rank."""
    layers = moe_layers(model)
    experts = {id(p) for layer in layers for p in layer.expert_parameters()}
    shared = sum(p.numel() for p in model.parameters() if id(p) not in experts)
    return describe(
        shared, [layer.num_experts for layer in layers], [layer.expert_size for layer in layers], model_cfg
    )
