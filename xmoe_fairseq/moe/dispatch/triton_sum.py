"""The sums of `gather_sum.py` as one Triton kernel; imported where there is a Triton only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 1024  # of a program
OF_A_WARP = 256  # 8 of each thread: 16 bytes in half precision


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    y, row, first, weight, out, width, ACC: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program sums the rows of one source, in `COLUMNS` of its `width` columns.

    `weight` may be None. Offsets are in 64 bits: R x D may pass 2^31.
    """
    source = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), dtype=ACC)
    for place in range(tl.load(first + source), tl.load(first + source + 1)):
        r = tl.load(row + place)
        value = tl.load(y + r * width + column, mask=inside, other=0).to(ACC)
        if weight is not None:
            value *= tl.load(weight + r).to(ACC)
        total += value
    tl.store(out + source * width + column, total.to(out.dtype.element_ty), mask=inside)


def triton_sums(
    y_RD: Tensor, row_R: Tensor, first_S1: Tensor, weight_R: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(S, D) on y's device; for S and D above 0."""
    num_sources, width = first_S1.numel() - 1, y_RD.size(1)
    out_SD = y_RD.new_empty(num_sources, width, dtype=dtype)
    weight_R = None if weight_R is None else weight_R.contiguous()
    accumulator = tl.float64 if torch.float64 in (y_RD.dtype, dtype) else tl.float32
    columns = min(triton.next_power_of_2(width), MOST_COLUMNS)
    grid = num_sources, triton.cdiv(width, columns)
    with torch.cuda.device(y_RD.get_device()):  # Triton launches on the current one
        sum_kernel[grid](
            y_RD.contiguous(), row_R, first_S1, weight_R, out_SD, width,
            ACC=accumulator, COLUMNS=columns, num_warps=max(columns // OF_A_WARP, 1),
        )  # fmt: skip
    return out_SD
