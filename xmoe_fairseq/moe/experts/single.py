"""What experts make of one token: decoding, sentence by sentence.

Reading the weights is what takes the time then, so what stands between two reads counts: no gathering of
rows, and no scattering of results.
"""

import torch
from torch import Tensor

from xmoe_fairseq.moe.dispatch.local import ExpertRows
from xmoe_fairseq.moe.experts.plain import Activation, Stacks


def is_single(x_SD: Tensor) -> bool:
    """One source row, on a CPU, without gradients, and in a precision in which it may be summed."""
    is_alone = x_SD.size(0) == 1 and x_SD.is_cpu and not torch.is_grad_enabled()
    return is_alone and x_SD.dtype in (torch.float32, torch.float64)


def expert_sums_single(x_1D: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation) -> Tensor:
    """As `expert_sums_plain`, to rounding; without gradients."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = stacks
    expert_R = rows.counts_E.nonzero().view(-1)  # none has more than one row
    experts, x_D = expert_R.tolist(), x_1D.view(-1)
    inner_RF = fc1_bias.index_select(0, expert_R)
    for expert, inner_F in zip(experts, inner_RF, strict=True):
        inner_F.addmv_(fc1_weight[expert], x_D)
    hidden_RF, bias_RD = activation(inner_RF), fc2_bias.index_select(0, expert_R)
    if rows.weight_R is None:
        y_D = bias_RD.sum(dim=0)
    else:
        hidden_RF = hidden_RF * rows.weight_R.unsqueeze(1)
        y_D = rows.weight_R @ bias_RD
    for expert, hidden_F in zip(experts, hidden_RF, strict=True):
        y_D.addmv_(fc2_weight[expert], hidden_F)
    return y_D.unsqueeze(0)
