"""Weighted sums of what experts make of rows, in C++: the fast path of a CPU (see native/experts.cpp).

The experts' rows are shared among threads. A piece of an expert's rows is gathered, computed, weighted and
added to the output while it lies in the cache; of all R rows nothing but the hidden layer is kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.local import ExpertRows
from xmoe_fairseq.moe.experts.loop import _differentiable
from xmoe_fairseq.moe.experts.plain import Activation, Stacks
from xmoe_fairseq.moe.native import missing

ACTIVATIONS: dict[Activation, int] = {F.relu: 0, torch.relu: 0, F.gelu: 1, F.silu: 2}  # as in experts.h
RELU = 0
SUMS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}


def refuse_native(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> str:
    """What the C++ operators need of a call and what they got, "a CPU, got cuda"; "" = they can."""
    is_autocast = torch.is_autocast_enabled("cpu")  # then x and the stacks come in its precision
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else x_SD.dtype
    if not x_SD.is_cpu:
        return f"a CPU, got {x_SD.device.type}"
    if dtype not in SUMS:
        return f"{', '.join(map(str, SUMS))}, got {dtype}"
    if not is_autocast and any(stack.dtype != dtype for stack in stacks):
        return f"experts in x's precision {dtype}, got {stacks.fc1_weight.dtype}"
    if rows.weight_R is not None and rows.weight_R.dtype != SUMS[dtype]:
        return f"weights in {SUMS[dtype]}, got {rows.weight_R.dtype}"
    if activation not in ACTIVATIONS:
        return f"relu, gelu or silu, got {getattr(activation, '__name__', activation)}"
    return f"its compiled library, but {reason}" if (reason := missing()) else ""


def expert_sums_native(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """As `expert_sums_plain`, to rounding, gradients of any order too, where `refuse_native` says nothing.

    Which units dropout takes is drawn by torch's generator, and the same for any number of threads.
    """
    inputs = (x_SD, rows.weight_R, *stacks)
    keep_RF, scale = None, 1.0
    if dropout:
        shape = rows.source_R.numel(), stacks.fc1_weight.size(1)
        keep_RF = torch.empty(shape, dtype=torch.bool).bernoulli_(1 - dropout)
        scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    options = rows.source_R, rows.counts_E, ACTIVATIONS[activation], keep_RF, scale
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y_SD: Tensor = _ExpertSums.apply(*inputs, *options, activation)  # type: ignore[no-untyped-call]
        return y_SD
    y_SD, _ = _call(inputs, *options, for_backward=False)
    return y_SD


def _call(
    inputs: tuple[Tensor | None, ...], source_R: Tensor, counts_E: Tensor, *options: Any, for_backward: bool
) -> tuple[Tensor, Tensor]:
    x_SD, weight_R, *stacks = inputs
    results: tuple[Tensor, Tensor] = torch.ops.xmoe.expert_sums(
        x_SD, source_R, weight_R, counts_E, *stacks, *options, for_backward
    )
    return results


class _ExpertSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, (source_R, counts_E, number, keep_RF, scale, activation) = arguments[:6], arguments[6:]
        y_SD, inner_RF = _call(inputs, source_R, counts_E, number, keep_RF, scale, for_backward=True)
        ctx.number, ctx.scale, ctx.activation = number, scale, activation
        # What dropout has taken is 0 in relu's output.
        ctx.save_for_backward(*inputs, source_R, counts_E, inner_RF, None if number == RELU else keep_RF)
        return y_SD

    @staticmethod
    def backward(ctx: Any, grad_y_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_R, *stacks, source_R, counts_E, inner_RF, keep_RF = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            rows, activation = ExpertRows(source_R, weight_R, counts_E), ctx.activation
            if ctx.scale != 1:
                activation = _dropped(ctx, inner_RF > 0 if keep_RF is None else keep_RF, counts_E)
            return *_differentiable(x_SD, rows, Stacks(*stacks), activation, grad_y_SD), *[None] * 6
        grads = torch.ops.xmoe.expert_gradients(
            grad_y_SD, inner_RF, x_SD, source_R, weight_R, counts_E, *stacks, ctx.number, keep_RF, ctx.scale,
            ctx.needs_input_grad[:6],
        )  # fmt: skip
        return *grads, *[None] * 6


def _dropped(ctx: Any, keep_RF: Tensor, counts_E: Tensor) -> Activation:
    """The activation and the dropout that there was: for each expert in order."""
    keeps = iter(keep_RF.split(counts_E.tolist()))
    return lambda inner_nF: ctx.activation(inner_nF) * next(keeps) * ctx.scale
