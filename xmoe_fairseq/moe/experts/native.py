"""Weighted sums of what experts make of rows, in C++: the fast path of a CPU (see native/experts.cpp).

The experts' rows are shared among threads. A piece of an expert's rows is gathered, computed, weighted and
added to the output while it lies in the cache; of all R rows nothing but the hidden layer is kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import Activation, Call, Stacks, register_kernel
from xmoe_fairseq.moe.experts.plain import differentiable, dropped
from xmoe_fairseq.moe.native import is_differentiated, missing
from xmoe_fairseq.moe.native.build import COMMAND

ACTIVATIONS: dict[Activation, int] = {F.relu: 0, torch.relu: 0, F.gelu: 1, F.silu: 2}  # as in experts.h
RELU = 0
SUMS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}


def refuse(call: Call) -> str:
    """What the C++ operators cannot take; last, and so only where they could, that they are not there."""
    if not call.x_SD.is_cpu:
        return f"a CPU, got {call.x_SD.device.type}"
    dtype, rows, stacks = call.dtype, call.rows, call.stacks
    if torch.compiler.is_compiling():
        return "eager mode, got torch.compile or torch.export"
    if dtype not in SUMS:
        return f"{', '.join(map(str, SUMS))}, got {dtype}"
    if not torch.is_autocast_enabled("cpu") and any(stack.dtype != dtype for stack in stacks):
        return f"experts in x's precision {dtype}, got {stacks.fc1_weight.dtype}"
    if rows.weight_R is not None and rows.weight_R.dtype != SUMS[dtype]:
        return f"weights in {SUMS[dtype]}, got {rows.weight_R.dtype}"
    if not any(call.activation is known for known in ACTIVATIONS):
        return f"relu, gelu or silu, got {getattr(call.activation, '__name__', call.activation)}"
    reason = missing()
    return f"its compiled library, but {reason}; run: {COMMAND}" if reason else ""


@register_kernel("native", refuse, preference=40, device="cpu")
def expert_sums_native(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """As `expert_sums_plain`, to rounding, gradients of any order too.

    Which units dropout takes is drawn by torch's generator, and the same for any number of threads.
    """
    inputs = (x_SD, rows.weight_R, *stacks)
    keep_RF, scale = None, 1.0
    if dropout:
        shape = rows.source_R.numel(), stacks.fc1_weight.size(1)
        keep_RF = torch.empty(shape, dtype=torch.bool).bernoulli_(1 - dropout)
        scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    options = rows.source_R, rows.counts_E, ACTIVATIONS[activation], keep_RF, scale
    if is_differentiated(*inputs):
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
                keep_RF = inner_RF > 0 if keep_RF is None else keep_RF
                activation = dropped(activation, keep_RF, ctx.scale, counts_E)
            call = Call(x_SD, rows, Stacks(*stacks), activation)
            return *differentiable(call, grad_y_SD), *[None] * 6
        grads = torch.ops.xmoe.expert_gradients(
            grad_y_SD, inner_RF, x_SD, source_R, weight_R, counts_E, *stacks, ctx.number, keep_RF, ctx.scale,
            ctx.needs_input_grad[:6],
        )  # fmt: skip
        return *grads, *[None] * 6
