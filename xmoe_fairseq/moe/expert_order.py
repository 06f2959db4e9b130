"""Choices of tokens -> rows in order of expert, without a sort: places of a mask (E, T) are in that order."""

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertOrder(NamedTuple):
    """R rows: all of expert 0, then of expert 1, ...; within an expert in order of token."""

    token_R: Tensor
    expert_R: Tensor
    rank_R: Tensor  # 0 = the token's first choice
    counts_E: Tensor  # rows of each expert


def expert_order(expert_TK: Tensor, chosen_TK: Tensor | None, num_experts: int) -> ExpertOrder:
    """A GPU's host waits for the number of rows, and for nothing if a token takes all its K experts.

    Args:
        expert_TK: distinct experts of each token, in order of preference.
        chosen_TK: bool, which of them it takes; None = all.
    """
    num_tokens, limit = expert_TK.shape
    if chosen_TK is not None:
        expert_TK = torch.where(chosen_TK, expert_TK, num_experts)  # a last row, of what nobody takes
    rank_KT = torch.arange(limit, device=expert_TK.device).unsqueeze(1).expand(limit, num_tokens)
    rank_ET = expert_TK.new_full((num_experts + 1, num_tokens), -1).scatter_(0, expert_TK.t(), rank_KT)[:-1]
    taken_ET = rank_ET >= 0
    if chosen_TK is None:
        expert_R, token_R = taken_ET.nonzero_static(size=num_tokens * limit).unbind(1)
    else:
        expert_R, token_R = taken_ET.nonzero(as_tuple=True)
    return ExpertOrder(token_R, expert_R, rank_ET[expert_R, token_R], taken_ET.sum(dim=1))


def of_rows(values_TE: Tensor, token_R: Tensor, expert_R: Tensor) -> Tensor:
    """(R,) the value of each row's token and expert; no pair twice. Not `values_TE[token_R, expert_R]`, whose
    gradient is sorted on a GPU."""
    return values_TE.reshape(-1).gather(0, torch.add(expert_R, token_R, alpha=values_TE.size(1)))
