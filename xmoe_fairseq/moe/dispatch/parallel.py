"""Routing -> rows at the ranks that hold their experts, and back: a row for each (token, rank)."""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xmoe_fairseq.moe.dispatch.all_to_all import Sizes, anchor, exchange_rows
from xmoe_fairseq.moe.dispatch.local import LocalDispatcher
from xmoe_fairseq.moe.dispatch.ranks import pairs_by_expert, rows_by_rank
from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.routing import Routing


class Sent(NamedTuple):
    """O rows of this rank's T tokens went out."""

    rows: ExpertRows  # which tokens' they are, by rank
    num_tokens: int
    dtype: torch.dtype  # in which rows travel, there and back: the tokens'
    sizes: Sizes  # of rows


class ExpertParallelDispatcher(LocalDispatcher):
    """Experts lie on the N ranks of a group, E/N in order on each. One rank with all tokens is the truth.

    Counts travel first, then a row for each token and rank that has some of its experts, and which these are,
    with their weights: no capacity slots, no padding to the largest rank. There what they make of it is
    weighed and added up, in fp32, and one row goes back. Rows are in the precision of the tokens, both ways:
    sums that came back in fp32 would save a rounding, and be half as many bytes again in bf16.
    All ranks of the group must call it the same number of times, also with zero tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExpertRows, Sent]:
        pairs = ExpertRows.of(routing)  # in order of expert, and so of the rank that holds it
        # always with weights, whatever another rank's router gives
        weight_R = torch.ones_like(routing.weight_R) if pairs.weight_R is None else pairs.weight_R
        x_SD, weight_P, source_P, counts_E, sent = _Dispatch.apply(  # type: ignore[no-untyped-call]
            x_TD, weight_R, anchor(), pairs.source_R, pairs.counts_E, self.group
        )
        return x_SD, ExpertRows(source_P, weight_P, counts_E), sent

    def combine(self, y_SD: Tensor, sent: Sent) -> Tensor:
        y_OD = exchange_rows(y_SD.to(sent.dtype), sent.sizes.back(), self.group)
        return sum_by_token(y_OD, sent.rows, sent.num_tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertParallelDispatcher":
        return copy(self)  # a process group is one thing, whoever holds it


class _Dispatch(torch.autograd.Function):
    """One node, so that all ranks exchange the gradients of tokens and weights in one order."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_R: Tensor, anchor: Tensor, token_R: Tensor, pairs_E: Tensor, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Sent]:
        pairs_NE = pairs_E.view(dist.get_world_size(group), -1)  # of E/N experts, by rank
        out = rows_by_rank(token_R, pairs_NE.sum(1), x_TD.size(0))
        received_NC, sizes = _exchange_counts(out.counts_N, pairs_NE, group)
        # A GPU does this while its host waits for the sizes; what is past the O rows is not sent.
        x_BD, choice_R2 = x_TD.index_select(0, out.token_B), _pack(out.row_R, weight_R)
        rows, pairs = (Sizes(*both) for both in sizes())
        token_O = out.token_B[: sum(rows.send)]
        x_SD = exchange_rows(x_BD[: len(token_O)], rows, group)
        row_P, weight_P = _unpack(exchange_rows(choice_R2, pairs, group), weight_R.dtype)
        order_P, first_P = pairs_by_expert(received_NC[:, 0], received_NC[:, 1:], row_P.numel())
        source_P, counts_E = row_P[order_P] + first_P, received_NC[:, 1:].sum(0)
        ctx.mark_non_differentiable(source_P, counts_E)
        ctx.save_for_backward(token_O, out.counts_N, order_P)
        sent = Sent(ExpertRows(token_O, None, out.counts_N), x_TD.size(0), x_TD.dtype, rows)
        ctx.num_tokens, ctx.dtype, ctx.rows, ctx.pairs, ctx.group = *sent[1:], pairs, group
        return x_SD, weight_P[order_P], source_P, counts_E, sent

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor, grad_P: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        token_O, counts_N, order_P = ctx.saved_tensors
        grad_OD = exchange_rows(grad_SD, ctx.rows.back(), ctx.group)
        grad_TD = sum_by_token(grad_OD, ExpertRows(token_O, None, counts_N), ctx.num_tokens).to(ctx.dtype)
        grad_P1 = torch.empty_like(grad_P).index_copy(0, order_P, grad_P).unsqueeze(1)
        grad_R = exchange_rows(grad_P1, ctx.pairs.back(), ctx.group).squeeze(1)
        return grad_TD, grad_R, None, None, None, None


def sum_by_token(y_OD: Tensor, rows: ExpertRows, num_tokens: int) -> Tensor:
    """(T, D), in fp32 at least."""
    return rows.weighted_sum(y_OD, num_tokens, torch.promote_types(y_OD.dtype, torch.float32))


def dispatcher_for(group: dist.ProcessGroup | None) -> tuple[LocalDispatcher, tuple[int, int]]:
    """And (i, N): the i-th of N equal parts of the experts lies here. None = all of them do."""
    if group is None:
        return LocalDispatcher(), (0, 1)
    return ExpertParallelDispatcher(group), (dist.get_rank(group), dist.get_world_size(group))


def _pack(row_R: Tensor, weight_R: Tensor) -> Tensor:
    """(R, 2) of integers, to travel in one exchange."""
    integer = torch.int32 if weight_R.element_size() == 4 else torch.int64
    return torch.stack([row_R.to(integer), weight_R.view(integer)], dim=1)


def _unpack(choice_P2: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    row_P, weight_P = choice_P2.t().contiguous()
    return row_P.long(), weight_P.view(dtype)


def _exchange_counts(
    rows_N: Tensor, pairs_NE: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Callable[[], Any]]:
    """From each rank its number of rows, then of pairs for each expert here, on the device; and what gives
    the host [[rows sent, rows received], [pairs sent, pairs received]], to and from each rank."""
    sent_NC = torch.cat([rows_N.unsqueeze(1), pairs_NE], dim=1)
    received_NC = torch.empty_like(sent_NC)
    dist.all_to_all_single(received_NC, sent_NC, group=group)
    both = torch.stack([sent_NC, received_NC])
    return received_NC, begin_copy(torch.stack([both[..., 0], both[..., 1:].sum(-1)]))


def begin_copy(numbers: Tensor) -> Callable[[], Any]:
    """Begin to copy them to the host. The call of what is returned waits, and gives them as lists."""
    if not numbers.is_cuda:
        return numbers.tolist
    copied, on_host = torch.cuda.Event(), numbers.to("cpu", non_blocking=True)
    copied.record()

    def wait() -> Any:
        copied.synchronize()
        return on_host.tolist()

    return wait
