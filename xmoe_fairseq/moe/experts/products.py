"""Products of rows with their experts' weights: all in one call of torch's, or one expert after the other."""

import logging
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.experts.kernels import Call

ALIGNMENT = 16  # bytes between rows that torch's grouped product asks for
MOST_EXPERTS = 1023  # torch 2.11 on an H100: "Can't process more than 1024 groups", from 1024 on


class Groups(NamedTuple):
    """The rows of each of E experts, those of expert 0 first."""

    ends_E: Tensor  # int32, where they end: what torch's grouped product goes by
    counts: list[int] | None  # how many there are, for products one after the other; None = grouped

    @classmethod
    def of(cls, call: Call) -> "Groups":
        """The host waits for the counts where torch's grouped product needs what the call has not."""
        counts_E, num_rows = call.rows.counts_E, call.rows.source_R.numel()
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        # torch's product for gradients of weights raises; compiled code cannot ask
        if not torch.compiler.is_compiling() and not num_rows:
            return cls(ends_E, [0] * counts_E.numel())
        needed = lacks(call)
        if needed and not torch.compiler.is_compiling():
            _say(needed)
        return cls(ends_E, counts_E.tolist() if needed else None)


def lacks(call: Call) -> str:
    """What torch's grouped product needs and got instead: "torch 2.10 or later, got 2.9"; "" = it can.

    On CUDA it has its one kernel for bf16 on capability 9 and 10 (`_grouped_mm_cuda` in torch's
    GroupedBlas.cpp, 2.10 to 2.13); elsewhere it copies the ends to the host in each product.
    """
    device, (experts, *sizes) = call.x_SD.device, call.stacks.fc1_weight.shape
    precisions = [torch.bfloat16]
    if device.type == "cpu" and not torch.compiler.is_compiling():
        precisions += [torch.float16, torch.float32]
    if not hasattr(F, "grouped_mm"):
        return f"torch 2.10 or later, got {torch.__version__}"
    if call.dtype not in precisions:
        return f"{' or '.join(map(str, precisions))}, got {call.dtype}"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device))[0] not in (9, 10):
        return f"compute capability 9 or 10, got {'.'.join(map(str, capability))}"
    if experts > MOST_EXPERTS:
        return f"at most {MOST_EXPERTS} experts, got {experts}"
    if any(size * call.dtype.itemsize % ALIGNMENT for size in sizes):
        return f"widths of a multiple of {ALIGNMENT} bytes, got {sizes} x {call.dtype.itemsize}"
    return ""


@cache
def _say(needed: str) -> None:
    """Once for each reason."""
    way = "experts follow one another, and the host waits once per call"
    logging.getLogger(__name__).info(f"{way}: torch's grouped product needs {needed}")


def product(a: Tensor, b: Tensor, groups: Groups) -> Tensor:
    """(R, K) rows times (E, K, N) -> (R, N); (M, R) columns times (R, N) rows -> (E, M, N)."""
    if groups.counts is None:
        return F.grouped_mm(a, b, offs=groups.ends_E)
    if b.dim() == 3:
        result = a.new_empty(a.size(0), b.size(2))
        pieces = zip(a.split(groups.counts), b.unbind(), result.split(groups.counts), strict=True)
    else:
        result = a.new_empty(len(groups.counts), a.size(0), b.size(1))
        pieces = zip(a.split(groups.counts, 1), b.split(groups.counts), result.unbind(), strict=True)
    for left, right, out in pieces:
        torch.mm(left, right, out=out)
    return result
