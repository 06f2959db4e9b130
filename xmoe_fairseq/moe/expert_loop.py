"""Weighted sums of what experts make of rows, a few experts at a time: the fast path of a CPU.

A chunk of rows is gathered, computed, weighted and added to the output while it lies in the cache; of all R
rows nothing but the hidden layer is kept. The gradients are worked out here because autograd would keep the
gathered rows too, and would copy the gradient of every expert into the stack.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xmoe_fairseq.moe.dispatch import ExpertRows
from xmoe_fairseq.moe.expert_sums import Activation, Stacks

# Rows of experts that are gathered together: few enough for the cache, enough to hide the cost of a call.
CHUNK_ROWS = 256


def expert_sums_loop(x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation) -> Tensor:
    """As `expert_sums_plain`, to rounding; gradients of first order only."""
    plan = list(chunks(rows.counts_E.tolist()))
    with torch.autocast(x_SD.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return _sums(x_SD, rows.weight_R, stacks, rows.source_R, plan, activation)[0]
        y_SD: Tensor = _ExpertLoop.apply(  # type: ignore[no-untyped-call]
            x_SD, rows.weight_R, *stacks, rows.source_R, plan, activation
        )
    return y_SD


class Chunk(NamedTuple):
    experts: list[int]  # that have rows
    counts: list[int]  # rows of each
    rows: slice  # all of them

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Each expert's part of the chunk's rows."""
        parts: tuple[Tensor, ...] = rows.split(self.counts)
        return parts


def chunks(counts: list[int]) -> Iterator[Chunk]:
    """Experts in order, as many as have CHUNK_ROWS together; at least one."""
    experts: list[int] = []
    sizes: list[int] = []
    start = 0
    for expert, count in enumerate(counts):
        if experts and count and sum(sizes) + count > CHUNK_ROWS:
            yield Chunk(experts, sizes, slice(start, start := start + sum(sizes)))
            experts, sizes = [], []
        if count:
            experts, sizes = [*experts, expert], [*sizes, count]
    if experts:
        yield Chunk(experts, sizes, slice(start, start + sum(sizes)))


def _sums(
    x_SD: Tensor,
    weight_R: Tensor | None,
    stacks: Stacks,
    source_R: Tensor,
    plan: list[Chunk],
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """(S, D) the sums, and (R, F) the hidden layer: relu's output, any other activation's input."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = stacks
    y_SD = x_SD.new_zeros(x_SD.shape, dtype=None if weight_R is None else weight_R.dtype)
    w1, w2 = fc1_weight.transpose(1, 2), fc2_weight.transpose(1, 2)
    inner_RF = x_SD.new_empty(source_R.numel(), fc1_weight.size(1))
    x_buffer, y_buffer = _buffer(x_SD, plan), _buffer(x_SD, plan)
    sum_buffer = y_buffer if y_SD.dtype == x_SD.dtype else _buffer(y_SD, plan)
    for chunk in plan:
        source, inner_rF = source_R[chunk.rows], inner_RF[chunk.rows]
        x_rD = torch.index_select(x_SD, 0, source, out=x_buffer[: source.numel()])
        # w1[e], not unbind: of few tokens few experts have rows.
        for e, x, inner in zip(chunk.experts, chunk.of(x_rD), chunk.of(inner_rF), strict=True):
            torch.addmm(fc1_bias[e], x, w1[e], out=inner)
        hidden_rF = inner_rF.relu_() if activation is F.relu else activation(inner_rF)
        y_rD = y_buffer[: source.numel()]
        for e, hidden, y in zip(chunk.experts, chunk.of(hidden_rF), chunk.of(y_rD), strict=True):
            torch.addmm(fc2_bias[e], hidden, w2[e], out=y)
        if weight_R is not None:
            weight_r1 = weight_R[chunk.rows].unsqueeze(1)
            y_rD = torch.mul(y_rD, weight_r1, out=sum_buffer[: source.numel()])
        y_SD.index_add_(0, source, y_rD)
    return y_SD, inner_RF


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
        plan: list[Chunk],
        activation: Activation,
    ) -> Tensor:
        stacks = Stacks(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        y_SD, inner_RF = _sums(x_SD, weight_R, stacks, source_R, plan, activation)
        ctx.plan, ctx.activation = plan, activation
        ctx.save_for_backward(x_SD, weight_R, fc1_weight, fc2_weight, fc2_bias, source_R, inner_RF)
        return y_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_R, fc1_weight, fc2_weight, fc2_bias, source_R, inner_RF = ctx.saved_tensors
        grad_y_SD = grad_y_SD.to(x_SD.dtype)
        grad_x_SD = x_SD.new_zeros(x_SD.shape)
        grad_weights = []
        grads = _gradients_of_stacks(fc1_weight, fc2_weight, ctx.plan)
        w1, w2, b2 = fc1_weight.unbind(), fc2_weight.unbind(), fc2_bias.unbind()
        grad_w1, grad_b1, grad_w2, grad_b2 = (grad.unbind() for grad in grads)
        x_buffer, y_buffer, hidden_buffer = (_buffer(like, ctx.plan) for like in (x_SD, x_SD, inner_RF))
        for chunk in ctx.plan:
            source = source_R[chunk.rows]
            x_rD, grad_y_rD, grad_hidden_rF = (
                buffer[: source.numel()] for buffer in (x_buffer, y_buffer, hidden_buffer)
            )
            grad_ys = chunk.of(torch.index_select(grad_y_SD, 0, source, out=grad_y_rD))
            for e, grad_y, grad in zip(chunk.experts, grad_ys, chunk.of(grad_hidden_rF), strict=True):
                torch.mm(grad_y, w2[e], out=grad)
            hidden_rF, pull_back = _activate(ctx.activation, inner_RF[chunk.rows])
            if weight_R is None:
                for e, grad_y in zip(chunk.experts, grad_ys, strict=True):
                    torch.sum(grad_y, 0, out=grad_b2[e])
            else:  # the weight goes to the narrow side: y = W2 (weight * hidden) + weight * b2
                grad_weight_r = torch.sum(grad_hidden_rF * hidden_rF, 1)
                weight_r = weight_R[chunk.rows].to(x_SD.dtype)
                weights = zip(chunk.of(weight_r), chunk.of(grad_weight_r), strict=True)
                for e, grad_y, (weight, grad_weight) in zip(chunk.experts, grad_ys, weights, strict=True):
                    torch.mv(grad_y.t(), weight, out=grad_b2[e])
                    grad_weight.addmv_(grad_y, b2[e])
                grad_weights.append(grad_weight_r)
                hidden_rF = hidden_rF * weight_r.unsqueeze(1)
                grad_hidden_rF.mul_(weight_r.unsqueeze(1))
            grad_inner_rF = pull_back(grad_hidden_rF)
            xs = chunk.of(torch.index_select(x_SD, 0, source, out=x_rD))
            of_experts = zip(
                chunk.experts, xs, chunk.of(grad_inner_rF), chunk.of(hidden_rF), grad_ys, strict=True
            )
            for e, x, grad_inner, hidden, grad_y in of_experts:
                torch.mm(grad_y.t(), hidden, out=grad_w2[e])
                torch.mm(grad_inner.t(), x, out=grad_w1[e])
                torch.sum(grad_inner, 0, out=grad_b1[e])
                torch.mm(grad_inner, w1[e], out=x)  # from here on the gradient of x
            grad_x_SD.index_add_(0, source, x_rD)
        # without weights None, without rows an empty one
        grad_weight_R = torch.cat(grad_weights).to(weight_R.dtype) if grad_weights else weight_R
        return grad_x_SD, grad_weight_R, *grads, None, None, None


def _activate(activation: Activation, inner_rF: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The hidden layer, and what makes of its gradient that of `inner_rF`."""
    if activation is F.relu:  # inner_rF is the hidden layer already
        return inner_rF, lambda grad_rF: torch.ops.aten.threshold_backward(grad_rF, inner_rF, 0)
    with torch.enable_grad():
        inner_rF = inner_rF.detach().requires_grad_()
        hidden_rF = activation(inner_rF)
    return hidden_rF.detach(), lambda grad_rF: torch.autograd.grad(hidden_rF, inner_rF, grad_rF)[0]


def _buffer(like: Tensor, plan: list[Chunk]) -> Tensor:
    """Room for any one chunk: the same for all, so that it stays in the cache."""
    return like.new_empty(max((sum(chunk.counts) for chunk in plan), default=0), like.size(1))


def _gradients_of_stacks(fc1_weight: Tensor, fc2_weight: Tensor, plan: list[Chunk]) -> list[Tensor]:
    """To be filled, but for the experts without rows, whose gradient is 0."""
    weights = (fc1_weight, fc2_weight)
    grads = [of(weight) for weight in weights for of in (torch.empty_like, _empty_bias)]
    busy = {expert for chunk in plan for expert in chunk.experts}
    for e in set(range(fc1_weight.size(0))) - busy:
        for grad in grads:
            grad[e].zero_()
    return grads


def _empty_bias(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[:2])
