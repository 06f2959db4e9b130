"""Weighted sums of what experts make of rows, one expert after the other: the fast path of a CPU.

An expert's rows are gathered, computed, weighted and added to the output while they lie in the cache; of all
R rows nothing but the hidden layer is kept. The gradients are worked out here because autograd would keep the
gathered rows too, and would copy the gradient of every expert into the stack.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xmoe_fairseq.moe.dispatch import ExpertRows
from xmoe_fairseq.moe.expert_sums import Activation, Stacks


def expert_sums_loop(x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation) -> Tensor:
    """As `expert_sums_plain`, to rounding; gradients of first order only."""
    counts = rows.counts_E.tolist()
    keep = torch.is_grad_enabled()
    with torch.autocast(x_SD.device.type, enabled=False):
        y_SD: Tensor = _ExpertLoop.apply(  # type: ignore[no-untyped-call]
            x_SD, rows.weight_R, *stacks, rows.source_R, counts, activation, keep
        )
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
        counts: list[int],
        activation: Activation,
        keep: bool,
    ) -> Tensor:
        y_SD = x_SD.new_zeros(x_SD.shape, dtype=None if weight_R is None else weight_R.dtype)
        w1, b1, w2, b2 = (stack.unbind() for stack in (fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        inner_RF = x_SD.new_empty(sum(counts), fc1_weight.size(1))  # before the activation (relu: after it)
        x_buffer, y_buffer = _Buffer(x_SD, counts), _Buffer(x_SD, counts)
        sum_buffer = y_buffer if y_SD.dtype == x_SD.dtype else _Buffer(y_SD, counts)
        for e, source, weight, inner_rF in _experts_with_rows(counts, source_R, weight_R, inner_RF):
            x_rD = torch.index_select(x_SD, 0, source, out=x_buffer[source])
            torch.addmm(b1[e], x_rD, w1[e].t(), out=inner_rF)
            hidden_rF = inner_rF.relu_() if activation is F.relu else activation(inner_rF)
            y_rD = torch.addmm(b2[e], hidden_rF, w2[e].t(), out=y_buffer[source])
            if weight is not None:
                y_rD = torch.mul(y_rD, weight.unsqueeze(1), out=sum_buffer[source])
            y_SD.index_add_(0, source, y_rD)
        if keep:
            ctx.counts, ctx.activation = counts, activation
            ctx.save_for_backward(x_SD, weight_R, fc1_weight, fc2_weight, fc2_bias, source_R, inner_RF)
        return y_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_R, fc1_weight, fc2_weight, fc2_bias, source_R, inner_RF = ctx.saved_tensors
        counts, grad_y_SD = ctx.counts, grad_y_SD.to(x_SD.dtype)
        grad_x_SD = x_SD.new_zeros(x_SD.shape)
        grad_weight_R = None if weight_R is None else torch.empty_like(weight_R)
        grads = _gradients_of_stacks(fc1_weight, fc2_weight, counts)
        w1, w2, b2 = fc1_weight.unbind(), fc2_weight.unbind(), fc2_bias.unbind()
        grad_w1, grad_b1, grad_w2, grad_b2 = (grad.unbind() for grad in grads)
        x_buffer, grad_y_buffer, hidden_buffer = (
            _Buffer(like, counts) for like in (x_SD, grad_y_SD, inner_RF)
        )
        for e, source, weight, grad_weight, inner_rF in _experts_with_rows(
            counts, source_R, weight_R, grad_weight_R, inner_RF
        ):
            grad_y_rD = torch.index_select(grad_y_SD, 0, source, out=grad_y_buffer[source])
            hidden_rF, pull_back = _activate(ctx.activation, inner_rF)
            grad_hidden_rF = torch.mm(grad_y_rD, w2[e], out=hidden_buffer[source])
            if weight is None:
                torch.sum(grad_y_rD, 0, out=grad_b2[e])
            else:  # the weight goes to the narrow side: y = W2 (weight * hidden) + weight * b2
                grad_weight.copy_((grad_hidden_rF * hidden_rF).sum(1)).add_(torch.mv(grad_y_rD, b2[e]))
                weight = weight.to(x_SD.dtype)
                torch.mv(grad_y_rD.t(), weight, out=grad_b2[e])
                hidden_rF = hidden_rF * weight.unsqueeze(1)
                grad_hidden_rF.mul_(weight.unsqueeze(1))
            torch.mm(grad_y_rD.t(), hidden_rF, out=grad_w2[e])
            grad_inner_rF = pull_back(grad_hidden_rF)
            x_rD = torch.index_select(x_SD, 0, source, out=x_buffer[source])
            torch.mm(grad_inner_rF.t(), x_rD, out=grad_w1[e])
            torch.sum(grad_inner_rF, 0, out=grad_b1[e])
            grad_x_rD = torch.mm(grad_inner_rF, w1[e], out=x_buffer[source])
            grad_x_SD.index_add_(0, source, grad_x_rD)
        return grad_x_SD, grad_weight_R, *grads, None, None, None, None


def _activate(activation: Activation, inner_rF: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The hidden layer, and what makes of its gradient that of `inner_rF`."""
    if activation is F.relu:  # inner_rF is the hidden layer already
        return inner_rF, lambda grad_rF: torch.ops.aten.threshold_backward(grad_rF, inner_rF, 0)
    with torch.enable_grad():
        inner_rF.requires_grad_()
        hidden_rF = activation(inner_rF)
    return hidden_rF.detach(), lambda grad_rF: torch.autograd.grad(hidden_rF, inner_rF, grad_rF)[0]


class _Buffer:
    """Room for the rows of any one expert: the same for all of them, so that it stays in the cache."""

    def __init__(self, like: Tensor, counts: list[int]) -> None:
        self.room = like.new_empty(max(counts, default=0), like.size(1))

    def __getitem__(self, source: Tensor) -> Tensor:
        return self.room[: source.size(0)]


def _experts_with_rows(counts: list[int], *of_R: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """(e, its part of each of `of_R`) of each expert e that has rows."""
    parts = [[None] * len(counts) if of is None else of.split(counts) for of in of_R]
    return ((e, *part) for e, (count, *part) in enumerate(zip(counts, *parts, strict=True)) if count)


def _gradients_of_stacks(fc1_weight: Tensor, fc2_weight: Tensor, counts: list[int]) -> list[Tensor]:
    """To be filled, but for the experts without rows, whose gradient is 0."""
    grads = [
        torch.empty_like(fc1_weight),
        fc1_weight.new_empty(fc1_weight.shape[:2]),
        torch.empty_like(fc2_weight),
        fc2_weight.new_empty(fc2_weight.shape[:2]),
    ]
    for e, count in enumerate(counts):
        if not count:
            for grad in grads:
                grad[e].zero_()
    return grads
