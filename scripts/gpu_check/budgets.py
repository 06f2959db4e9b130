"""What a layer may cost on a GPU beside its products: one table, held by the suite on a CPU, where the code
that a GPU runs is counted, and by check_gpu.sh on a GPU.

Who makes something cheaper lowers its numbers; who makes it dearer must say why.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.timing import host_waits
from gpu_check.dispatched import Dispatched
from xmoe_fairseq.moe import (
    CheapExperts,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    MoELayer,
    ReLURouter,
    RoutingStats,
    SeqTopKRouter,
    ThresholdRouter,
    TokenRouter,
    TopAnyRouter,
    TopKRouter,
    step_balance,
    use_kernel,
)
from xmoe_fairseq.moe.dispatch.gather_sum import BySource

CPU = torch.device("cpu")
T, D, F, E = 800, 64, 32, 8  # enough tokens for what routers do with many
PADDED = T - 30


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Nothing native, and no look into a tensor."""
    with ExitStack() as stack:
        stack.enter_context(patch("xmoe_fairseq.moe.native.routing.missing", lambda: "this is a GPU"))
        for module in ("finite", "routers.hash"):
            stack.enter_context(patch(f"xmoe_fairseq.moe.{module}.can_read", lambda tensor: False))
        stack.enter_context(patch.object(BySource, "of", BySource.sorted))
        yield


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
    """At most. What is kept for the backward pass, over R rows of width D in the layer's
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
    return layer, torch.randn(T, D, dtype=dtype)


@contextmanager
def watched(device: torch.device, *known: Tensor) -> Iterator[Dispatched]:
    """On a GPU waits are what torch sees there."""
    if device.type != "cuda":
        with Dispatched(*known) as seen:
            yield seen
        return
    with host_waits() as waited, Dispatched(*known) as seen:
        yield seen
    seen.waits = Counter(waited)


def run(name: str, device: torch.device) -> tuple[dict[str, Dispatched], int]:
    """Forward, backward, statistics and what else follows an update; how many rows there are."""
    torch.manual_seed(1)
    router, kernel, *options = name.split()
    layer, x_TD = layer_of(router, kernel, options)
    layer, x_TD = layer.to(device), x_TD.to(device).requires_grad_(layer.training)
    mask_T = torch.arange(T, device=device) >= PADDED if "padding" in options else None
    ids_T = torch.arange(T, device=device) // 40
    with use_kernel(kernel), torch.set_grad_enabled(layer.training):
        if "again" in options:
            layer(x_TD, mask_T, ids_T)
        with watched(device, x_TD, *layer.parameters()) as forward:
            y_TD, routing = layer(x_TD, mask_T, ids_T)
    with watched(device) as backward:
        if layer.training:
            (y_TD.sum(dtype=torch.float32) + routing.load_balance_loss).backward()
    with watched(device) as statistics:
        RoutingStats.of(routing)
    with watched(device) as after:
        type(layer.router).after_update(layer)
        step_balance(layer)
    seen = {"forward": forward, "backward": backward, "statistics": statistics, "update": after}
    return seen, routing.token_R.numel()


def cost_of(name: str, device: torch.device = CPU) -> tuple[Budget, list[str]]:
    """What it took, and what must not be: waits elsewhere than in the forward pass, what torch refuses under
    deterministic algorithms."""
    with as_on_a_gpu():
        if device.type == "cuda":
            run(name, device)  # libraries and kernels are made ready at their first use
        seen, rows = run(name, device)
    forward, backward, statistics, _ = seen.values()
    kept = forward.saved_bytes / (rows * D * (2 if "grouped" in name else 4))
    cost = Budget(forward.waits.total(), forward.kernels.total(), backward.kernels.total(), round(kept, 2))
    wrong = [
        f"{part} waits for {dict(one.waits)}" for part, one in seen.items() if part != "forward" and one.waits
    ]
    wrong += [f"{part} has {dict(one.refused)}" for part, one in seen.items() if one.refused]
    if statistics.kernels.total() > STATISTICS:
        wrong.append(f"statistics are {statistics.kernels.total()} kernels, at most {STATISTICS}")
    return cost, wrong
