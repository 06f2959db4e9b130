"""A model's MoE layers, what they routed, and whether the numbers were finite."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe.routed_layer import RoutedLayer
from xmoe_fairseq.moe.routing import Routing


def moe_layers(model: nn.Module) -> list[RoutedLayer]:
    """In the order of the model's modules: an encoder's before a decoder's, from the lowest up."""
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def fix_thresholds(model: nn.Module, thresholds: Sequence[float], rule: str | None = None) -> None:
    """One for each MoE layer, in the order of `moe_layers`; of this rule, or of that which it has."""
    for layer, threshold in zip(moe_layers(model), thresholds, strict=True):
        layer.router.fix(threshold, rule)  # type: ignore[call-arg, operator]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[tuple[RoutedLayer, Routing]]]:
    """Collects the (layer, routing) of every MoE layer call of `model` inside the `with` block, in order.

    What runs after the block, such as the recomputation of checkpointed activations in the backward pass,
    is not recorded, so a loss taken from the list counts once.
    """
    records: list[tuple[RoutedLayer, Routing]] = []

    def keep(layer: RoutedLayer, _: Any, output: tuple[Tensor, Routing]) -> None:
        records.append((layer, output[1]))

    handles = [layer.register_forward_hook(keep) for layer in moe_layers(model)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def check_finite(model: nn.Module) -> None:
    """Whether all scores of the MoE layers were finite since the last time: to be called before an update is
    applied, or a result is used. On a CPU there is nothing to do, as the layers themselves have raised.

    A GPU's host waits once for all layers.

    Raises:
        FloatingPointError: they were not; the first such layer is named.
    """
    found = [(layer.name, layer.finite) for layer in moe_layers(model) if layer.finite is not None]
    if not found:
        return
    for layer in moe_layers(model):
        layer.finite = None
    names, finite_L = zip(*found, strict=True)
    for name, finite in zip(names, torch.stack(finite_L).tolist(), strict=True):
        if math.isnan(finite):
            raise FloatingPointError(f"{name}: router input or scores are NaN or inf")


def finite_so_far(model: nn.Module) -> Tensor | float:
    """0; NaN if `check_finite` would raise. Nothing waits for it."""
    return sum((layer.finite for layer in moe_layers(model) if layer.finite is not None), 0.0)
