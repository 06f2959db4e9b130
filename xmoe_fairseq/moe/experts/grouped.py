"""Weighted sums of what experts make of rows, in products over all experts at once: the fast path of a GPU.

One function with a backward pass of its own. Of what it computes it keeps the pre-activations alone; rows are
gathered again and the activation is taken again, which costs less than to read them.

A bias is a weight of an input that is 1: `_extended` appends it to the weights as a column. So biases cost no
pass over all rows, and their gradients are sums of products, in fp32, always in one order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.gather_sum import BySource, sum_rows
from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import Activation, Call, Stacks, register_kernel
from xmoe_fairseq.moe.experts.plain import differentiable, dropped
from xmoe_fairseq.moe.experts.products import ALIGNMENT, Groups, product

aten = torch.ops.aten
# Functions of the pre-activation alone, which may be taken again: (gradient, pre-activation) -> gradient.
DERIVATIVES: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    F.relu: lambda grad, z: aten.threshold_backward(grad, z, 0),
    torch.relu: lambda grad, z: aten.threshold_backward(grad, z, 0),
    F.gelu: aten.gelu_backward,
    F.silu: aten.silu_backward,
    torch.tanh: lambda grad, z: aten.tanh_backward(grad, z.tanh()),
}


def refuse(call: Call) -> str:
    """What other activations draw, learn or change in place would be lost when they are taken again."""
    if not any(call.activation is known for known in DERIVATIVES):
        return f"relu, gelu, silu or tanh, got {getattr(call.activation, '__name__', call.activation)}"
    return ""


@register_kernel("grouped", refuse, preference=20, device="cuda")
def expert_sums_grouped(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """As `expert_sums_plain`, to rounding, gradients of any order too; in any precision.

    The host learns nothing about the rows but their number where torch's grouped product can do without
    (`products.lacks`); where it cannot, once per call how many each expert has.

    Which units dropout takes follows from a number that torch's generator of the CPU draws, and the backward
    pass makes the same mask of it. So none is kept; to pack one into bits would take several passes over it,
    to draw it again takes one.
    """
    call = Call(x_SD, rows, stacks, activation, dropout)
    seed = int(torch.randint(2**62, (1,), device="cpu")) if dropout else 0
    options = *Groups.of(call), activation, dropout, seed
    y_SD: Tensor = _ExpertSums.apply(  # type: ignore[no-untyped-call]
        x_SD, rows.weight_R, *stacks, rows.source_R, rows.counts_E, *options
    )
    return y_SD


class _ExpertSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, weight_R: Tensor | None, *arguments: Any) -> Tensor:
        *stacks, source_R, counts_E, ends_E, counts, activation, dropout, seed = arguments
        (w1, b1, w2, b2), groups = stacks, Groups(ends_E, counts)
        order = BySource.of(source_R, x_SD.size(0))
        x_RK = _extended(x_SD).index_select(0, source_R)
        inner_RF = product(x_RK, _extended(w1, b1).transpose(1, 2), groups)
        saved = x_SD, weight_R, *stacks, source_R, counts_E, ends_E, inner_RF, order.row_R, order.first_S1
        ctx.save_for_backward(*saved)
        ctx.options = counts, activation, dropout, seed
        hidden_RF = _dropout(activation(inner_RF), _keep(inner_RF, dropout, seed), dropout)
        hidden_RK = _weigh(_extended(hidden_RF), weight_R)  # here, where rows are narrow
        y_RD = product(hidden_RK, _extended(w2, b2).transpose(1, 2), groups)
        dtype = x_SD.dtype if weight_R is None else torch.promote_types(x_SD.dtype, weight_R.dtype)
        return sum_rows(y_RD, order, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_R, *stacks, source_R, counts_E, ends_E, inner_RF, row_R, first_S1 = ctx.saved_tensors
        counts, activation, dropout, seed = ctx.options
        rows, keep_RF = ExpertRows(source_R, weight_R, counts_E), _keep(inner_RF, dropout, seed)
        call = Call(x_SD, rows, Stacks(*stacks), activation, dropout)
        if torch.is_grad_enabled():  # create_graph=True
            if keep_RF is not None:
                call = call._replace(activation=dropped(activation, keep_RF, _scale(dropout), counts_E))
            return *differentiable(call, grad_SD), *[None] * 7
        orders = Groups(ends_E, counts), BySource(source_R, x_SD.size(0), row_R, first_S1)
        return *_gradients(grad_SD, call, *orders, inner_RF, keep_RF, ctx.needs_input_grad), *[None] * 7


def _gradients(
    grad_SD: Tensor, call: Call, groups: Groups, order: BySource, inner_RF: Tensor, keep_RF: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of x, the weights and the four stacks, those that are needed."""
    x_SD, rows, (w1, _, w2, b2), activation, dropout = call
    weight_R, counts_E = rows.weight_R, rows.counts_E
    needs_x, needs_weight = needs[:2]
    needs_fc1, needs_fc2 = any(needs[2:4]), any(needs[4:6])
    grad_x_SD = grad_weight_R = None
    fc1: tuple[Tensor | None, Tensor | None] = (None, None)
    fc2 = fc1
    grad_RD = grad_SD.to(x_SD.dtype).index_select(0, rows.source_R)
    if needs_weight or needs_fc2:
        hidden_RK = _extended(_dropout(activation(inner_RF), keep_RF, dropout))
    if needs_weight or needs_fc1 or needs_x:
        grad_RK = product(grad_RD, _extended(w2, b2), groups)
    if needs_weight and weight_R is not None:
        grad_weight_R = (grad_RK * hidden_RK).sum(1, dtype=weight_R.dtype)
    if needs_fc2:
        fc2 = _apart(product(grad_RD.t(), _weigh(hidden_RK, weight_R), groups), counts_E)
    if needs_fc1 or needs_x:
        grad_RF = _dropout(_weigh(grad_RK, weight_R)[:, : inner_RF.size(1)], keep_RF, dropout)
        grad_RF = DERIVATIVES[activation](grad_RF, inner_RF)
    if needs_fc1:
        x_RK = _extended(x_SD).index_select(0, rows.source_R)
        fc1 = _apart(product(grad_RF.t(), x_RK, groups), counts_E)
    if needs_x:
        grad_x_SD = sum_rows(product(grad_RF, w1, groups), order)
    return grad_x_SD, grad_weight_R, *fc1, *fc2


def _extended(rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K) with one column more, the bias or ones, and columns of 0 up to torch's alignment."""
    last = rows.new_ones(rows.shape[:-1]) if bias is None else bias
    return torch.cat([rows, F.pad(last.unsqueeze(-1), (0, ALIGNMENT // rows.itemsize - 1))], -1)


def _apart(grad_ENK: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weights and of their bias; 0 for experts without rows.

    A copy is due anyway, for gradients are to lie as parameters do. And what torch's product gives without
    rows is not 0 on a B200: https://github.com/pytorch/pytorch/issues/172439.
    """
    has_rows_E1, size = (counts_E > 0).unsqueeze(1), grad_ENK.size(-1) - ALIGNMENT // grad_ENK.itemsize
    weight = torch.where(has_rows_E1.unsqueeze(2), grad_ENK[:, :, :size], 0.0)
    return weight, torch.where(has_rows_E1, grad_ENK[:, :, size], 0.0)


def _weigh(rows_RK: Tensor, weight_R: Tensor | None) -> Tensor:
    """In place; multiplied in the precision of the weights."""
    return rows_RK if weight_R is None else rows_RK.mul_(weight_R.unsqueeze(1))


def _keep(inner_RF: Tensor, dropout: float, seed: int) -> Tensor | None:
    """The units that dropout leaves; None = all."""
    if not dropout:
        return None
    generator = torch.Generator(inner_RF.device).manual_seed(seed)
    return torch.empty_like(inner_RF, dtype=torch.bool).bernoulli_(1 - dropout, generator=generator)


def _dropout(rows_RF: Tensor, keep_RF: Tensor | None, dropout: float) -> Tensor:
    """A function of its own transpose: it is the same forward and backward."""
    return rows_RF if keep_RF is None else aten.native_dropout_backward(rows_RF, keep_RF, _scale(dropout))


def _scale(dropout: float) -> float:
    return 1 / (1 - dropout) if dropout < 1 else 0.0
