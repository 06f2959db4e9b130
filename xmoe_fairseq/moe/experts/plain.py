"""Weighted sums of what experts make of rows, in plain autograd: what the fast ways must equal.

It also computes what they cannot take: other types, activations and devices, or no compiled library.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import PLAIN, Activation, Call, Stacks, register_kernel


@register_kernel(PLAIN, preference=1)
def expert_sums_plain(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """`y_s = sum of weight_r * FFN_e(x_s)` over the rows r of source s, each of one expert e; any dtype.

    Args:
        dropout: probability after the activation.
    """
    # unbind, not W[e]: indexing under autograd costs a gradient of the whole stack per expert.
    experts = [*zip(rows.source_R.split(rows.counts_E.tolist()), *(s.unbind() for s in stacks), strict=True)]
    outputs = []
    # Of few tokens few experts have rows; without any, one keeps the parameters in the graph.
    for source, w1, b1, w2, b2 in [e for e in experts if e[0].numel()] or experts[:1]:
        hidden = activation(F.linear(x_SD.index_select(0, source), w1, b1))
        outputs.append(F.linear(F.dropout(hidden, dropout, dropout > 0), w2, b2))
    return rows.weighted_sum(torch.cat(outputs), x_SD.size(0))


def differentiable(call: Call, grad_y_SD: Tensor) -> list[Tensor | None]:
    """Gradients of x, the weights, and the stacks that can be differentiated again."""
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


def dropped(activation: Activation, keep_RF: Tensor, scale: float, counts_E: Tensor) -> Activation:
    """The activation and the dropout that there was: for each expert that has rows, in order."""
    keeps = iter(keep_RF.split([count for count in counts_E.tolist() if count] or [0]))
    return lambda inner_nF: activation(inner_nF) * next(keeps) * scale
