"""Weighted sums of what experts make of rows, all experts in one grouped product: the fast path of a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import Activation, Call, Stacks, register_kernel
from xmoe_fairseq.moe.experts.plain import expert_sums_plain

ALIGNMENT = 16  # bytes between rows that torch's grouped product asks for
MOST_EXPERTS = 1023  # torch 2.11 on an H100: "Can't process more than 1024 groups", from 1024 on


def refuse(call: Call) -> str:
    """What torch asks for: its version 2.10, a precision, sizes; a GPU of NVIDIA's since Ampere, or a CPU."""
    x_SD, (experts, *sizes) = call.x_SD, call.stacks.fc1_weight.shape
    precisions = (torch.bfloat16,) if x_SD.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if not hasattr(F, "grouped_mm"):
        return f"torch 2.10 or later, got {torch.__version__}"
    if call.dtype not in precisions:
        return f"{' or '.join(map(str, precisions))} on {x_SD.device.type}, got {call.dtype}"
    if x_SD.is_cuda and torch.cuda.get_device_capability(x_SD.device) < (8, 0):
        return f"compute capability 8.0, got {torch.cuda.get_device_capability(x_SD.device)}"
    if experts > MOST_EXPERTS:
        return f"at most {MOST_EXPERTS} experts, got {experts}"
    if any(size * call.dtype.itemsize % ALIGNMENT for size in sizes):
        return f"widths of a multiple of {ALIGNMENT} bytes, got {sizes} x {call.dtype.itemsize}"
    if isinstance(call.activation, nn.Module):  # whose weights autocast would have to cast, which is off here
        return f"a function as activation, got the module {type(call.activation).__name__}"
    return ""


@register_kernel("grouped", refuse, preference=20, device="cuda")
def expert_sums_grouped(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """As `expert_sums_plain`, to rounding. The host learns nothing about the rows but their number."""
    if rows.source_R.numel() == 0:  # the product's backward raises without rows
        return expert_sums_plain(x_SD, rows, stacks, activation, dropout)
    ends_E = rows.counts_E.cumsum(0).to(torch.int32)
    expert_R = torch.repeat_interleave(rows.counts_E, output_size=rows.source_R.numel())
    x_RD = x_SD.index_select(0, rows.source_R)
    inner_RF = F.grouped_mm(x_RD, stacks.fc1_weight.transpose(1, 2), offs=ends_E)
    hidden_RF = activation(inner_RF + _bias_of_rows(stacks.fc1_bias, expert_R, ends_E))
    hidden_RF = F.dropout(hidden_RF, dropout, dropout > 0)
    y_RD = F.grouped_mm(hidden_RF, stacks.fc2_weight.transpose(1, 2), offs=ends_E)
    y_RD = y_RD + _bias_of_rows(stacks.fc2_bias, expert_R, ends_E)
    return rows.weighted_sum(y_RD, x_SD.size(0))


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
