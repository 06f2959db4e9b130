"""The gradients of loop.py, written out: those that somebody wants, and no product for the others."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.experts.chunks import Chunk, buffer_for
from xmoe_fairseq.moe.experts.kernels import Activation, Call


class Gradients(NamedTuple):
    """What all threads fill, each where its experts are; None = nobody wants it."""

    x: bool  # whether x's is wanted, to which all shares add
    weight_R: Tensor | None
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None

    @classmethod
    def wanted(cls, call: Call, needed: tuple[bool, ...]) -> "Gradients":
        """
        Args:
            needed: by x, the weights and the stacks, as autograd says.
        """
        of = [
            torch.empty_like(tensor) if tensor is not None and is_needed else None
            for tensor, is_needed in zip((call.rows.weight_R, *call.stacks), needed[1:], strict=False)
        ]
        return cls(needed[0], *of)

    def clear(self, experts: Iterable[int]) -> None:
        """Those without rows."""
        for grad in self[2:]:
            if grad is not None:
                for expert in experts:
                    grad[expert].zero_()

    @property
    def inner(self) -> bool:
        """Whether that of the hidden layer before the activation is needed for them."""
        return self.x or self.fc1_weight is not None or self.fc1_bias is not None


def gradients_of_share(
    call: Call, inner_RF: Tensor, grad_y_SD: Tensor, grads: Gradients, share: list[Chunk]
) -> Tensor:
    """The share's part of the gradient of x; the others are filled where its experts are."""
    x_SD, rows, (w1, _, w2, _), activation, _ = call
    grad_x_SD = x_SD.new_zeros(x_SD.shape if grads.x else ())
    x_buffer, y_buffer, hidden_buffer = (buffer_for(like, share) for like in (x_SD, x_SD, inner_RF))
    for chunk in share:
        source = rows.source_R[chunk.rows]
        x_rD, grad_y_rD, grad_hidden_rF = (
            buffer[: source.numel()] for buffer in (x_buffer, y_buffer, hidden_buffer)
        )
        grad_ys = chunk.of(torch.index_select(grad_y_SD, 0, source, out=grad_y_rD))
        if grads.inner or grads.weight_R is not None:
            for e, grad_y, grad in zip(chunk.experts, grad_ys, chunk.of(grad_hidden_rF), strict=True):
                torch.mm(grad_y, w2[e], out=grad)
        hidden_rF, pull_back = _activate(activation, inner_RF[chunk.rows])
        if rows.weight_R is None:
            if grads.fc2_bias is not None:
                for e, grad_y in zip(chunk.experts, grad_ys, strict=True):
                    torch.sum(grad_y, 0, out=grads.fc2_bias[e])
        else:
            hidden_rF = _weigh(call, grads, chunk, grad_ys, hidden_rF, grad_hidden_rF)
        if grads.fc2_weight is not None:
            for e, grad_y, hidden in zip(chunk.experts, grad_ys, chunk.of(hidden_rF), strict=True):
                torch.mm(grad_y.t(), hidden, out=grads.fc2_weight[e])
        if grads.inner:
            x_rD = torch.index_select(x_SD, 0, source, out=x_rD)
            _first_layer(grads, chunk, w1, chunk.of(x_rD), chunk.of(pull_back(grad_hidden_rF)))
        if grads.x:
            grad_x_SD.index_add_(0, source, x_rD)
    return grad_x_SD


def _weigh(
    call: Call,
    grads: Gradients,
    chunk: Chunk,
    grad_ys: tuple[Tensor, ...],
    hidden_rF: Tensor,
    grad_hidden_rF: Tensor,
) -> Tensor:
    """The hidden layer times the rows' weights; its gradient, in place, too.

    The weight goes to the narrow side: y = W2 (weight * hidden) + weight * b2.
    """
    assert call.rows.weight_R is not None
    weight_r = call.rows.weight_R[chunk.rows].to(call.x_SD.dtype)
    if grads.weight_R is not None:
        grad_weight_r = torch.sum(grad_hidden_rF * hidden_rF, 1)
        for e, grad_y, grad_weight in zip(chunk.experts, grad_ys, chunk.of(grad_weight_r), strict=True):
            grad_weight.addmv_(grad_y, call.stacks.fc2_bias[e])
        grads.weight_R[chunk.rows] = grad_weight_r
    if grads.fc2_bias is not None:
        for e, grad_y, weight in zip(chunk.experts, grad_ys, chunk.of(weight_r), strict=True):
            torch.mv(grad_y.t(), weight, out=grads.fc2_bias[e])
    if grads.inner:
        grad_hidden_rF.mul_(weight_r.unsqueeze(1))
    return hidden_rF * weight_r.unsqueeze(1) if grads.fc2_weight is not None else hidden_rF


def _first_layer(
    grads: Gradients, chunk: Chunk, w1: Tensor, xs: tuple[Tensor, ...], grad_inners: tuple[Tensor, ...]
) -> None:
    """Afterwards the rows of x, where its gradient is wanted, are that."""
    for e, x, grad_inner in zip(chunk.experts, xs, grad_inners, strict=True):
        if grads.fc1_weight is not None:
            torch.mm(grad_inner.t(), x, out=grads.fc1_weight[e])
        if grads.fc1_bias is not None:
            torch.sum(grad_inner, 0, out=grads.fc1_bias[e])
        if grads.x:
            torch.mm(grad_inner, w1[e], out=x)


def _activate(activation: Activation, inner_rF: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The hidden layer, and what makes of its gradient that of `inner_rF`."""
    if activation is F.relu:  # inner_rF is the hidden layer already
        return inner_rF, lambda grad_rF: torch.ops.aten.threshold_backward(grad_rF, inner_rF, 0)
    with torch.enable_grad():
        inner_rF = inner_rF.detach().requires_grad_()
        hidden_rF = activation(inner_rF)
    return hidden_rF.detach(), lambda grad_rF: torch.autograd.grad(hidden_rF, inner_rF, grad_rF)[0]
