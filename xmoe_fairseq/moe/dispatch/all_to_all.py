"""Rows from every rank to every rank, as many as there are, and their gradients back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_rows(rows_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `send[0]` rows to rank 0 of the group, the next `send[1]` to rank 1, ...; zeros allowed.

    Differentiable. Backward is an exchange too, so every rank must take part in it: also one that sends
    nothing, and one whose own rows need no gradient.

    Returns:
        (sum(receive), D): first the rows from rank 0, then those from rank 1, ...
    """
    # An input that always needs a gradient: without it autograd would skip the backward exchange on a rank
    # whose rows need none, and the other ranks would wait for it.
    anchor = torch.zeros((), requires_grad=True)
    received: Tensor = _ExchangeRows.apply(rows_RD, anchor, send, receive, group)  # type: ignore[no-untyped-call]
    return received


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, anchor: Tensor, send: list[int], receive: list[int], group: Any
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received_RD = rows_RD.new_empty(sum(receive), rows_RD.size(-1))
        dist.all_to_all_single(received_RD, rows_RD.contiguous(), receive, send, group=group)
        return received_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return exchange_rows(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None, None
