"""What a layer may cost on a GPU beside its products, counted on a CPU by the code that a GPU runs.

One table of budgets. Who makes something cheaper lowers its numbers; who makes it dearer must say why.
"""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from dispatched import Dispatched
from tolerances import assert_same
from torch import Tensor

from xmoe_fairseq.moe import (
    CheapExperts,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    MoELayer,
    ReLURouter,
    Routing,
    RoutingStats,
    SeqTopKRouter,
    ThresholdRouter,
    TokenRouter,
    TopAnyRouter,
    TopKRouter,
    finite,
    step_balance,
    use_kernel,
)
from xmoe_fairseq.moe.dispatch.gather_sum import BySource
from xmoe_fairseq.moe.native import routing as native_routing

T, D, F, E = 800, 64, 32, 8  # enough tokens for what routers do with many
PADDED = T - 30


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing native, and no look into a tensor."""
    monkeypatch.setattr(native_routing, "missing", lambda: "this is a GPU")
    monkeypatch.setattr(finite, "can_read", lambda tensor: False)
    monkeypatch.setattr("xmoe_fairseq.moe.routers.hash.can_read", lambda tensor: False)
    monkeypatch.setattr(BySource, "of", BySource.sorted)


ROUTERS: dict[str, Any] = {
    "threshold": lambda experts: ThresholdRouter(D, experts, 0.5, 4),
    "budget": lambda experts: ThresholdRouter(D, experts, target_experts_per_token=2),
    "probability": lambda experts: ThresholdRouter(D, experts, 0.1, rule="probability"),
    "topk": lambda experts: TopKRouter(D, experts, 2),
    "relu": lambda experts: ReLURouter(D, experts, 2),
    "topany": lambda experts: TopAnyRouter(D, experts, 2, adapt_experts_every=2),
    "hash": lambda experts: HashRouter(D, experts, torch.arange(99) % experts),
    "seq_topk": lambda experts: SeqTopKRouter(D, experts, 2),
    "expert_choice": lambda experts: ExpertChoiceRouter(D, experts, 2),
    "expert_threshold": lambda experts: ExpertThresholdRouter(D, experts, 2),
}


class Budget(NamedTuple):
    """At most; of waits exactly. What is kept for the backward pass, over R rows of width D in the layer's
    precision."""

    waits: int
    forward: int  # kernels
    backward: int
    kept: float


# By router, kernel of the experts and what else there is. A layer has to wait for the number R of its rows,
# unless a token takes a number that is known. Nothing waits in the backward pass, for statistics, and where
# budgets and the like move. "again" is the next layer of a model, with the same mask.
BUDGETS = {
    "threshold plain": Budget(2, 69, 106, 2.7),
    "threshold grouped": Budget(1, 55, 55, 0.9),
    "threshold grouped eval": Budget(1, 55, 0, 0),
    "threshold grouped padding": Budget(2, 61, 58, 1.6),
    "threshold grouped padding again": Budget(1, 60, 58, 1.6),
    "threshold grouped capacity": Budget(2, 76, 57, 1.25),
    "threshold grouped normalized": Budget(1, 62, 63, 1.05),
    "threshold grouped ones": Budget(1, 58, 57, 0.9),
    "threshold grouped bias": Budget(1, 61, 49, 0.9),
    "threshold grouped cheap": Budget(2, 67, 68, 1.85),
    "budget grouped": Budget(1, 68, 55, 1),
    "probability grouped": Budget(1, 47, 55, 0.85),
    "topk plain": Budget(1, 58, 106, 2.75),
    "topk grouped": Budget(0, 44, 55, 0.95),
    "relu grouped": Budget(1, 42, 53, 0.95),
    "topany grouped": Budget(1, 86, 122, 3.4),
    "hash grouped": Budget(0, 36, 34, 0.8),
    "seq_topk grouped": Budget(1, 61, 55, 0.95),
    "expert_choice grouped": Budget(1, 49, 49, 0.95),
    "expert_threshold grouped": Budget(1, 68, 50, 1.1),
}
STATISTICS = 25  # kernels
LAYERS: dict[str, dict[str, Any]] = {
    "capacity": {"capacity_factor": 1.0},
    "normalized": {"combine": "normalized"},
    "ones": {"combine": "ones"},
    "cheap": {"cheap": CheapExperts(D, 1, 1)},
}


def layer_of(router: str, kernel: str, options: list[str]) -> tuple[MoELayer, Tensor]:
    """And tokens for it."""
    dtype = torch.bfloat16 if kernel == "grouped" else torch.float32
    arguments = {name: value for option in options for name, value in LAYERS.get(option, {}).items()}
    made: TokenRouter = ROUTERS[router](E + 2 * ("cheap" in arguments))
    if "bias" in options:
        made.balance_by("bias")
    layer = MoELayer(D, F, E, made, **arguments).to(dtype).train("eval" not in options)
    return layer, torch.randn(T, D, dtype=dtype, requires_grad=layer.training)


def run(name: str) -> tuple[Dispatched, Dispatched, Dispatched, Routing]:
    """Forward, backward and what follows them."""
    router, kernel, *options = name.split()
    layer, x_TD = layer_of(router, kernel, options)
    mask_T = torch.arange(T) >= PADDED if "padding" in options else None
    ids_T = torch.arange(T) // 40
    with use_kernel(kernel), torch.set_grad_enabled(layer.training):
        if "again" in options:
            layer(x_TD, mask_T, ids_T)
        with Dispatched(x_TD, *layer.parameters()) as forward:
            y_TD, routing = layer(x_TD, mask_T, ids_T)
    with Dispatched() as backward:
        if layer.training:
            (y_TD.sum(dtype=torch.float32) + routing.load_balance_loss).backward()
    with Dispatched() as after:
        RoutingStats.of(routing)
    statistics = sum(after.kernels.values())
    assert statistics <= STATISTICS, after.kernels
    with after:
        type(layer.router).after_update(layer)
        step_balance(layer)
    return forward, backward, after, routing


@pytest.mark.parametrize("name", BUDGETS)
def test_waits_kernels_and_bytes(name: str) -> None:
    budget = BUDGETS[name]
    forward, backward, after, routing = run(name)
    assert sum(forward.waits.values()) == budget.waits, forward.waits
    assert not backward.waits and not after.waits, (backward.waits, after.waits)
    assert sum(forward.kernels.values()) <= budget.forward, forward.kernels
    assert sum(backward.kernels.values()) <= budget.backward, backward.kernels
    kept = forward.saved_bytes / (routing.token_R.numel() * D * (2 if "grouped" in name else 4))
    assert kept <= budget.kept, f"{kept:.2f}"
    refused: Counter[str] = forward.refused + backward.refused + after.refused
    assert not refused  # by torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("router", ["threshold", "budget", "topk"])
def test_a_router_compiles_into_one_graph_for_all_sizes(router: str) -> None:
    """By "aot_eager": inductor's C++ takes a compiler too long for a suite."""
    torch._dynamo.reset()
    made = ROUTERS[router](E)
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    config = torch._dynamo.config
    for call, tokens in enumerate((300, 290, 299, 200, 150)):
        x_TD, is_known = torch.randn(tokens, D), call > 1  # a budget has nothing to add to in the first
        with config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=is_known):
            routings = compiled(x_TD), made(x_TD)
        for name in ("token_R", "expert_R", "rank_R", "weight_R", "probs_TE"):
            assert torch.equal(*(getattr(routing, name) for routing in routings)), name
        losses = [routing.weight_R.sum() + routing.load_balance_loss for routing in routings]
        assert_same(*(torch.autograd.grad(loss, made.weight)[0] for loss in losses))
