"""Weighted sums of what experts make of rows, in plain autograd: the path that the fast ones must equal."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.local import ExpertRows

Activation = Callable[[Tensor], Tensor]


class Stacks(NamedTuple):
    """The parameters of E experts of width F, in the `nn.Linear` convention."""

    fc1_weight: Tensor  # (E, F, D)
    fc1_bias: Tensor  # (E, F)
    fc2_weight: Tensor  # (E, D, F)
    fc2_bias: Tensor  # (E, D)


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
    y_RD = torch.cat(outputs)
    if rows.weight_R is not None:
        y_RD = y_RD * rows.weight_R.unsqueeze(-1)
    return y_RD.new_zeros(x_SD.shape).index_add(0, rows.source_R, y_RD)
