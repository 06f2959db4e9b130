"""Which rows go to which rank, and what arrives there: R (token, expert) pairs go out on O rows, one for each
(token, rank), and P pairs on S rows come in. Nothing here waits for a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor


class RankRows(NamedTuple):
    """O rows: first those for rank 0, then those for rank 1, ...; for a rank in order of token."""

    token_B: Tensor  # of the first O of them; B >= O is known without asking the device for O
    row_R: Tensor  # on which row for its rank each pair travels
    counts_N: Tensor  # rows for each rank


def rows_by_rank(token_R: Tensor, pairs_N: Tensor, num_tokens: int) -> RankRows:
    """Of pairs in order of the rank to which they go, so many to each."""
    num_pairs, num_ranks = token_R.numel(), pairs_N.numel()
    rank_R = _repeat(torch.arange(num_ranks, device=token_R.device), pairs_N, num_pairs)
    cell_R = rank_R * num_tokens + token_R
    goes_C = token_R.new_zeros(num_ranks * num_tokens).index_fill_(0, cell_R, 1)
    counts_N = goes_C.view(num_ranks, num_tokens).sum(1)
    row_R = goes_C.cumsum(0)[cell_R] - 1
    # the same token, wherever two of its pairs write to one row
    token_B = token_R.new_zeros(min(num_pairs, goes_C.numel())).scatter_(0, row_R, token_R)
    return RankRows(token_B, row_R - _starts(counts_N)[rank_R], counts_N)


def pairs_by_expert(rows_N: Tensor, pairs_NE: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Pairs arrived by rank, then expert. (P,) which of them come in order of expert, then rank; and of each
    the first row that its rank sent.

    Args:
        rows_N: rows from each rank.
        pairs_NE: pairs from each rank for each of the experts here.
    """
    pairs_EN = pairs_NE.t().flatten()
    moved_EN = _starts(pairs_NE.flatten()).view(pairs_NE.shape).t().flatten() - _starts(pairs_EN)
    first_EN = _starts(rows_N).repeat(pairs_NE.size(1))
    moved_P, first_P = _repeat(torch.stack([moved_EN, first_EN], dim=1), pairs_EN, num_pairs).unbind(1)
    return torch.arange(num_pairs, device=rows_N.device) + moved_P, first_P


def _repeat(values_N: Tensor, times_N: Tensor, size: int) -> Tensor:
    return values_N.repeat_interleave(times_N, dim=0, output_size=size)


def _starts(counts_N: Tensor) -> Tensor:
    return counts_N.cumsum(0) - counts_N
