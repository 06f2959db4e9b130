"""Weighted sums of what experts make of rows, a few experts at a time: a CPU's fast path without native.py.

A chunk of rows is gathered, computed, weighted and added to the output while it lies in the cache; of all R
rows nothing but the hidden layer is kept. The gradients are worked out in gradients.py because
autograd would keep the gathered rows too, and would copy the gradient of every expert into the stack.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.chunks import Chunk, buffer_for, compute, shares_of
from xmoe_fairseq.moe.experts.gradients import Gradients, gradients_of_share
from xmoe_fairseq.moe.experts.kernels import Activation, Call, Stacks, refuse_modules, register_kernel
from xmoe_fairseq.moe.experts.plain import expert_sums_plain


@register_kernel("loop", refuse_modules, preference=10)
def expert_sums_loop(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """As `expert_sums_plain`, to rounding, gradients of any order too."""
    threads = torch.get_num_threads() if x_SD.is_cpu else 1
    inputs = (x_SD, rows.weight_R, *stacks)
    shares = shares_of(rows.counts_E.tolist(), stacks.fc1_weight[0].numel(), threads)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
        return _sums(Call(x_SD, rows, stacks, activation), shares, None)
    y_SD: Tensor = _ExpertLoop.apply(  # type: ignore[no-untyped-call]
        *inputs, rows.source_R, rows.counts_E, shares, activation
    )
    return y_SD


def _sums(call: Call, shares: list[list[Chunk]], inner_RF: Tensor | None) -> Tensor:
    """
    Args:
        inner_RF: to be filled with what the backward pass needs of the hidden layer.
    """
    first, *others = compute(partial(_sums_of_share, call, inner_RF), shares)
    for other in others:
        first.add_(other)
    return first


def _sums_of_share(call: Call, inner_RF: Tensor | None, share: list[Chunk]) -> Tensor:
    x_SD, rows, (fc1_weight, fc1_bias, fc2_weight, fc2_bias), activation, _ = call
    weight_R = rows.weight_R
    y_SD = x_SD.new_zeros(x_SD.shape, dtype=None if weight_R is None else weight_R.dtype)
    w1, w2 = fc1_weight.transpose(1, 2), fc2_weight.transpose(1, 2)
    x_buffer, y_buffer = buffer_for(x_SD, share), buffer_for(x_SD, share)
    sum_buffer = y_buffer if y_SD.dtype == x_SD.dtype else buffer_for(y_SD, share)
    inner_buffer = buffer_for(fc1_bias, share) if inner_RF is None else inner_RF
    for chunk in share:
        source = rows.source_R[chunk.rows]
        size = source.numel()
        inner_rF = inner_buffer[:size] if inner_RF is None else inner_RF[chunk.rows]
        x_rD = torch.index_select(x_SD, 0, source, out=x_buffer[:size])
        # w1[e], not unbind: of few tokens few experts have rows.
        for e, x, inner in zip(chunk.experts, chunk.of(x_rD), chunk.of(inner_rF), strict=True):
            torch.addmm(fc1_bias[e], x, w1[e], out=inner)
        hidden_rF = inner_rF.relu_() if activation is F.relu else activation(inner_rF)
        y_rD = y_buffer[:size]
        for e, hidden, y in zip(chunk.experts, chunk.of(hidden_rF), chunk.of(y_rD), strict=True):
            torch.addmm(fc2_bias[e], hidden, w2[e], out=y)
        if weight_R is not None:
            y_rD = torch.mul(y_rD, weight_R[chunk.rows].unsqueeze(1), out=sum_buffer[:size])
        y_SD.index_add_(0, source, y_rD)
    return y_SD


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        weight_R: Tensor | None,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        source_R: Tensor,
        counts_E: Tensor,
        shares: list[list[Chunk]],
        activation: Activation,
    ) -> Tensor:
        inner_RF = x_SD.new_empty(source_R.numel(), fc1_weight.size(1))  # relu's output, others' input
        stacks = Stacks(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        rows = ExpertRows(source_R, weight_R, counts_E)
        y_SD = _sums(Call(x_SD, rows, stacks, activation), shares, inner_RF)
        ctx.shares, ctx.activation = shares, activation
        ctx.save_for_backward(x_SD, weight_R, *stacks, source_R, counts_E, inner_RF)
        return y_SD

    @staticmethod
    def backward(ctx: Any, grad_y_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_R, *parameters, source_R, counts_E, inner_RF = ctx.saved_tensors
        rows = ExpertRows(source_R, weight_R, counts_E)
        call = Call(x_SD, rows, Stacks(*parameters), ctx.activation)
        if torch.is_grad_enabled():  # create_graph=True
            return *differentiable(call, grad_y_SD), *[None] * 4
        grads = Gradients.wanted(call, ctx.needs_input_grad)
        busy = {expert for share in ctx.shares for chunk in share for expert in chunk.experts}
        grads.clear(set(range(call.stacks.fc1_weight.size(0))) - busy)
        work = partial(gradients_of_share, call, inner_RF, grad_y_SD.to(x_SD.dtype), grads)
        grad_x_SD, *others = compute(work, ctx.shares)
        for other in others:
            grad_x_SD.add_(other)
        return grad_x_SD if grads.x else None, grads.weight_R, *grads[2:], *[None] * 4


def differentiable(call: Call, grad_y_SD: Tensor) -> list[Tensor | None]:
    """Gradients of x, the weights, and the stacks that can be differentiated again: in plain autograd."""
    inputs = [call.x_SD, call.rows.weight_R, *call.stacks]
    # Views: the weights themselves depend on x, whose gradient by that way is not this function's.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x_SD, weight_R, *parameters = inputs
    rows = replace(call.rows, weight_R=weight_R)
    y_SD = expert_sums_plain(x_SD, rows, Stacks(*parameters), call.activation)  # type: ignore[arg-type]
    needed = {i: tensor for i, tensor in enumerate(inputs) if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad(
        y_SD, list(needed.values()), grad_y_SD, create_graph=True, materialize_grads=True
    )
    found = dict(zip(needed, grads, strict=True))
    return [found.get(i) for i in range(len(inputs))]
