"""Sums of rows by their source, and the gather that is their transpose, in an order that is always the same.

On a GPU `index_add` adds by atomics: in the order in which blocks happen to run, and so with other last
bits each time. Here each source reads its own rows, one after the other, and sums them in fp32 at least.
"""

import os
from importlib.util import find_spec
from shutil import which
from typing import Any, NamedTuple

import torch
from torch import Tensor

# With what it needs to launch a kernel, which is compiled C.
HAS_TRITON = bool(find_spec("triton") and (which(os.environ.get("CC", "gcc")) or which("clang")))
TRITON_CAPABILITY = (8, 0)  # of NVIDIA's cards, as Triton asks


class BySource(NamedTuple):
    """R rows that belong to S sources; what `sum_rows` and `gather_rows` go by.

    The rows of source s are `row_R[first_S1[s] : first_S1[s + 1]]`. On a CPU there is no such order (None):
    its `index_add` walks the rows one after the other, as they lie, and all is plain autograd.
    """

    source_R: Tensor  # of each row, int64
    num_sources: int
    row_R: Tensor | None = None  # int64, all rows of source 0, then of 1, ...; within one the sums' order
    first_S1: Tensor | None = None  # int64, where each source's rows begin in row_R; the last is R

    @classmethod
    def of(cls, source_R: Tensor, num_sources: int) -> "BySource":
        """Within a source the rows rise. Nothing waits for the host."""
        return cls.sorted(source_R, num_sources) if source_R.is_cuda else cls(source_R, num_sources)

    @classmethod
    def sorted(cls, source_R: Tensor, num_sources: int) -> "BySource":
        """`of`, with the order on any device."""
        sorted_R, row_R = source_R.int().sort(stable=True)  # int: half of the digits that a GPU sorts by
        sources_S1 = torch.arange(num_sources + 1, dtype=torch.int32, device=source_R.device)
        return cls(source_R, num_sources, row_R, torch.searchsorted(sorted_R, sources_S1))


def sum_rows(
    y_RD: Tensor, order: BySource, weight_R: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """(S, D) `sum of weight_r * y_r` over the rows r of source s; 0 for a source without rows.

    Its gradients are gathers, and can be differentiated again. It may be called in another function's forward
    or backward pass. On a GPU a source's sum depends on its rows alone, and is the same bits every time.

    Args:
        y_RD: fp64, fp32, bf16 or fp16.
        weight_R: None = 1.
        dtype: of the result; None = that of y and the weights together. Sums are in fp32 at least.
    """
    dtype = dtype or (y_RD.dtype if weight_R is None else torch.promote_types(y_RD.dtype, weight_R.dtype))
    source_R, num_sources, *sorted_ = order
    if order.row_R is None:
        if weight_R is not None:
            y_RD = y_RD * weight_R.unsqueeze(1)
        y_RD = y_RD.to(torch.promote_types(y_RD.dtype, dtype))
        return y_RD.new_zeros(num_sources, y_RD.size(1)).index_add(0, source_R, y_RD).to(dtype)
    y_SD: Tensor = _SumRows.apply(y_RD, weight_R, dtype, source_R, *sorted_)  # type: ignore[no-untyped-call]
    return y_SD


def gather_rows(x_SD: Tensor, order: BySource) -> Tensor:
    """(R, D) the source of each row: `x_SD[source_R]`, whose gradient is `sum_rows`, in x's precision."""
    source_R, _, *sorted_ = order
    if order.row_R is None:
        return x_SD.index_select(0, source_R)
    x_RD: Tensor = _GatherRows.apply(x_SD, source_R, *sorted_)  # type: ignore[no-untyped-call]
    return x_RD


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_R: Tensor | None, dtype: torch.dtype, *order: Tensor
    ) -> Tensor:
        ctx.save_for_backward(None if weight_R is None else y_RD, weight_R, *order)
        ctx.dtype = y_RD.dtype
        _, row_R, first_S1 = order
        return _sums(y_RD, row_R, first_S1, weight_R, dtype)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, weight_R, *order = ctx.saved_tensors
        grad_RD = gather_rows(grad_SD, _order(*order))
        grad_weight_R = None
        if weight_R is not None:
            if ctx.needs_input_grad[1]:
                grad_weight_R = (grad_RD * y_RD).sum(1).to(weight_R.dtype)
            grad_RD = grad_RD * weight_R.unsqueeze(1)
        return grad_RD.to(ctx.dtype), grad_weight_R, *[None] * 4


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, *order: Tensor) -> Tensor:
        ctx.save_for_backward(*order)
        return x_SD.index_select(0, order[0])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(grad_RD, _order(*ctx.saved_tensors)), *[None] * 3


def _order(source_R: Tensor, row_R: Tensor, first_S1: Tensor) -> BySource:
    return BySource(source_R, first_S1.numel() - 1, row_R, first_S1)


def _sums(
    y_RD: Tensor, row_R: Tensor, first_S1: Tensor, weight_R: Tensor | None, dtype: torch.dtype
) -> Tensor:
    num_sources, width = first_S1.numel() - 1, y_RD.size(1)
    if not (num_sources and y_RD.numel()):
        return y_RD.new_zeros(num_sources, width, dtype=dtype)
    if takes_triton(y_RD):
        from xmoe_fairseq.moe.dispatch.triton_sum import triton_sums

        return triton_sums(y_RD, row_R, first_S1, weight_R, dtype)
    return torch_sums(y_RD, row_R, first_S1, weight_R, dtype)


def takes_triton(y_RD: Tensor) -> bool:
    on_gpu = HAS_TRITON and y_RD.is_cuda
    return on_gpu and torch.cuda.get_device_capability(y_RD.device) >= TRITON_CAPABILITY


def torch_sums(
    y_RD: Tensor, row_R: Tensor, first_S1: Tensor, weight_R: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """By torch alone: on a GPU a thread has a column of a bag, whose rows it adds one after the other."""
    precision = torch.promote_types(torch.promote_types(y_RD.dtype, dtype), torch.float32)
    weight_R = None if weight_R is None else weight_R.to(precision).index_select(0, row_R)
    sums = torch.embedding_bag(
        y_RD.to(precision), row_R, first_S1, mode=0, per_sample_weights=weight_R, include_last_offset=True
    )
    return sums[0].to(dtype)
