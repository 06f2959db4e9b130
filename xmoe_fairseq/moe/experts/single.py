"""What experts make of one token: decoding, sentence by sentence.

Reading the weights is what takes the time then, so what stands between two reads counts: no gathering of
rows, and no scattering of results.
"""

import torch
from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import Activation, Call, Stacks, refuse_modules, register_kernel


def refuse(call: Call) -> str:
    """What is not one source row, on a CPU, without gradients, in a precision in which it may be summed."""
    if call.x_SD.size(0) != 1:
        return f"one token, got {call.x_SD.size(0)}"
    if not call.x_SD.is_cpu:
        return f"a CPU, got {call.x_SD.device.type}"
    if torch.is_grad_enabled():
        return "torch.no_grad(), got grad mode"
    if call.dtype not in (torch.float32, torch.float64):
        return f"torch.float32 or torch.float64, got {call.dtype}"
    weight_R = call.rows.weight_R
    if weight_R is not None and weight_R.dtype != call.dtype:
        return f"weights in {call.dtype}, got {weight_R.dtype}"
    return refuse_modules(call)


@register_kernel("single", refuse, preference=30, device="cpu")
def expert_sums_single(
    x_1D: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """As `expert_sums_plain`, to rounding; without gradients."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = stacks
    expert_R = rows.counts_E.nonzero().view(-1)
    if expert_R.numel() < rows.source_R.numel():  # a router may choose an expert twice
        expert_R = torch.repeat_interleave(rows.counts_E)
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
