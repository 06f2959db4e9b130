"""Weighted sums of what experts make of rows, all experts in one grouped product: the fast path of a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.dispatch.local import ExpertRows
from xmoe_fairseq.moe.experts.plain import Activation, Stacks, expert_sums_plain

ALIGNMENT = 16  # bytes between rows that torch's grouped product asks for
MOST_EXPERTS = 1023  # torch 2.11 on an H100: "Can't process more than 1024 groups", from 1024 on


def can_group(x_SD: Tensor, stacks: Stacks) -> bool:
    """Whether torch has a grouped product for these: torch 2.10, bf16, on an NVIDIA GPU since Ampere."""
    return (
        hasattr(F, "grouped_mm")
        and x_SD.is_cuda
        and x_SD.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x_SD.device) >= (8, 0)
        and stacks.fc1_weight.size(0) <= MOST_EXPERTS
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
    hidden_RF = activation(inner_RF + _bias_of_rows(stacks.fc1_bias, expert_R, ends_E))
    y_RD = F.grouped_mm(hidden_RF, stacks.fc2_weight.transpose(1, 2), offs=ends_E)
    y_RD = y_RD + _bias_of_rows(stacks.fc2_bias, expert_R, ends_E)
    if rows.weight_R is not None:
        y_RD = y_RD * rows.weight_R.unsqueeze(1)
    return y_RD.new_zeros(x_SD.shape).index_add(0, rows.source_R, y_RD)


def _bias_of_rows(bias_EN: Tensor, expert_R: Tensor, ends_E: Tensor) -> Tensor:
    """(R, N) the bias of each row's expert.

    On a GPU the gradient of `index_select` adds row after row in bf16, where a sum soon stands still: of
    60,000 rows on 8 experts it was 57 % off. A product with ones adds in fp32, and always in one order.
    """
    bias_RN: Tensor = _BiasOfRows.apply(bias_EN, expert_R, ends_E)  # type: ignore[no-untyped-call]
    return bias_RN


class _BiasOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias_EN: Tensor, expert_R: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return bias_EN.index_select(0, expert_R)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        ones_R8 = grad_RN.new_ones(grad_RN.size(0), ALIGNMENT // grad_RN.element_size())
        return F.grouped_mm(ones_R8.t(), grad_RN.contiguous(), offs=ends_E)[:, 0], None, None
