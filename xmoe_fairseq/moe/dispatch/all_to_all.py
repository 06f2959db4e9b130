"""Rows from every rank to every rank, as many as there are, and their gradients back."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Sizes(NamedTuple):
    """The first `send[0]` rows go to rank 0 of a group, the next `send[1]` to rank 1, ...; zeros allowed."""

    send: list[int]
    receive: list[int]  # rows from each rank

    def back(self) -> "Sizes":
        return Sizes(self.receive, self.send)


def exchange_rows(rows_RD: Tensor, sizes: Sizes, group: dist.ProcessGroup) -> Tensor:
    """Send `sum(sizes.send)` rows.

    Differentiable. Backward is an exchange too, so every rank must take part in it: also one that sends
    nothing, and one whose own rows need no gradient.

    Returns:
        (sum(sizes.receive), D): first the rows from rank 0, then those from rank 1, ...
    """
    received: Tensor = _ExchangeRows.apply(rows_RD, anchor(), sizes, group)  # type: ignore[no-untyped-call]
    return received


def anchor() -> Tensor:
    """An input that always needs a gradient: without it autograd would skip the backward exchange on a rank
    whose rows need none, and the other ranks would wait for it."""
    return torch.zeros((), requires_grad=True)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, anchor: Tensor, sizes: Sizes, group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        received_RD = rows_RD.new_empty(sum(sizes.receive), rows_RD.size(-1))
        dist.all_to_all_single(received_RD, rows_RD.contiguous(), sizes.receive, sizes.send, group=group)
        return received_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange_rows(grads[0], ctx.sizes.back(), ctx.group), None, None, None
