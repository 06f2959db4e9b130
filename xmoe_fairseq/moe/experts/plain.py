"""Weighted sums of what experts make of rows, in plain autograd: the path that the fast ones must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import PLAIN, Activation, Stacks, register_kernel


@register_kernel(PLAIN, preference=1)
def expert_sums_plain(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """`y_s = sum of weight_r * FFN_e(x_s)` over the rows r of source s, each of one expert e; any dtype.

    Args:
        dropout: probability after the activation.
    """
    counts = rows.counts_E.tolist()
    outputs = []
    # unbind, not W[e]: indexing under autograd costs a gradient of the whole stack per expert.
    for source, w1, b1, w2, b2 in zip(
        rows.source_R.split(counts), *(stack.unbind() for stack in stacks), strict=True
    ):
        hidden = activation(F.linear(x_SD.index_select(0, source), w1, b1))
        outputs.append(F.linear(F.dropout(hidden, dropout, dropout > 0), w2, b2))
    return rows.weighted_sum(torch.cat(outputs), x_SD.size(0))
