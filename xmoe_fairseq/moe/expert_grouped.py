"""Weighted sums of what experts make of rows, all experts in one grouped product: the fast path of a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch import ExpertRows
from xmoe_fairseq.moe.expert_sums import Activation, Stacks, expert_sums_plain

ALIGNMENT = 16  # bytes between rows that torch's grouped product asks for


def can_group(x_SD: Tensor, stacks: Stacks) -> bool:
    """Whether torch has a grouped product for these: bf16, on an NVIDIA GPU since Ampere."""
    return (
        x_SD.is_cuda
        and x_SD.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x_SD.device) >= (8, 0)
        and all(size * x_SD.element_size() % ALIGNMENT == 0 for size in stacks.fc1_weight.shape[1:])
    )


def expert_sums_grouped(x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation) -> Tensor:
    """As `expert_sums_plain`, to rounding. The host learns nothing about the rows but their number."""
    if rows.source_R.numel() == 0:  # the product's backward raises without rows
        return expert_sums_plain(x_SD, rows, stacks, activation)
    ends_E = rows.counts_E.cumsum(0).to(torch.int32)
    expert_R = torch.repeat_interleave(rows.counts_E, output_size=rows.source_R.numel())
    x_RD = x_SD.index_select(0, rows.source_R)
    inner_RF = F.grouped_mm(x_RD, stacks.fc1_weight.transpose(1, 2), offs=ends_E)
    hidden_RF = activation(inner_RF + stacks.fc1_bias.index_select(0, expert_R))
    y_RD = F.grouped_mm(hidden_RF, stacks.fc2_weight.transpose(1, 2), offs=ends_E)
    y_RD = y_RD + stacks.fc2_bias.index_select(0, expert_R)
    if rows.weight_R is not None:
        y_RD = y_RD * rows.weight_R.unsqueeze(1)
    return y_RD.new_zeros(x_SD.shape).index_add(0, rows.source_R, y_RD)
