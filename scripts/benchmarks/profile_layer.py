"""Where the time of an MoE layer goes: a call of a model, forward and backward, by kind of operation."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.timing import forward
from xmoe_fairseq.moe import MoELayer, moe_layers

PRODUCTS = "matrix products (mm, addmm), the router's too"
REST = "other operations"
PYTHON = "Python and autograd, between operations"
KINDS = {
    PRODUCTS: ("mm", "addmm", "bmm"),
    "gathering rows": ("index_select", "index", "gather"),
    "weighting and adding rows": ("index_add_", "index_put_", "mul", "mul_"),
    "gradients of biases and combine weights": ("mv", "addmv", "addmv_", "sum"),
    "activation": ("relu_", "clamp_min_", "threshold_backward"),
    "choosing and sorting": (
        "topk", "sort", "nonzero", "cumsum", "scatter_add_", "_softmax", "lt",
        "__lshift__", "__rshift__", "bitwise_or",
    ),
    "new memory and zeros": (
        "empty", "empty_strided", "empty_like", "new_empty", "new_zeros", "zeros", "zero_", "fill_",
    ),
    "views of the experts' parts": (
        "as_strided", "split", "split_with_sizes", "unbind", "t", "transpose", "select", "slice", "expand",
        "unsqueeze", "view", "resolve_conj",
    ),
}  # fmt: skip
ROOT = "the MoE layer"


@dataclass
class LayerCall:
    layer: MoELayer
    inputs: tuple[Any, ...]  # of its forward; x detached
    grad_y: Tensor

    def run(self) -> None:
        """Forward and backward as in training, with the load-balance loss; gradients are new."""
        x = self.inputs[0].detach().requires_grad_()
        self.layer.zero_grad()
        y, routing = self.layer(x, *self.inputs[1:])
        torch.autograd.backward([y, routing.load_balance_loss], [self.grad_y, None])


def first_call(model: nn.Module, run: Callable[[], object]) -> LayerCall:
    """Of the first MoE layer, when the model runs."""
    calls = []

    def keep(layer: MoELayer, inputs: tuple[Tensor, ...]) -> None:
        x, *others = inputs
        calls.append(LayerCall(layer, (x.detach(), *others), torch.randn_like(x)))

    hook = moe_layers(model)[0].register_forward_pre_hook(keep)
    forward(run)()
    hook.remove()
    return calls[0]


def time_by_kind(call: LayerCall, rounds: int) -> dict[str, float]:
    """Milliseconds of one forward + backward, by kind; they add up to all of it.

    An operation's own time, without that of operations that it calls, as torch's profiler has it. What no
    operation accounts for is Python's and autograd's.
    """
    call.run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            with record_function(ROOT):
                call.run()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return {kind: time / 1000 / rounds for kind, time in by_kind(times).items()}


def by_kind(times: dict[str, float]) -> dict[str, float]:
    """Sums of what the profiler calls `aten::mm` and so on."""
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    sums: dict[str, float] = defaultdict(float, dict.fromkeys((*KINDS, REST, PYTHON), 0.0))
    for key, time in times.items():
        sums[kind_of.get(key, REST if key.startswith("aten::") else PYTHON)] += time
    return dict(sums)


def share_outside_products(times: dict[str, float]) -> float:
    return 1 - times[PRODUCTS] / sum(times.values())
