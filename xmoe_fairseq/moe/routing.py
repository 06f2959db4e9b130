"""The record that a router hands on: which token goes to which expert, with what weight."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """R routed (token, expert) pairs of T tokens and E experts.

    Everything behind the router (capacity, dispatch, experts, combine) follows these rows and
    nothing else, so a pair that is not listed here costs nothing. Rows of one expert are in order of token;
    how those of several lie among each other is the router's affair.
    """

    token_R: Tensor  # index into this rank's non-padding tokens
    expert_R: Tensor  # global expert id
    rank_R: Tensor  # 0 = the token's first choice
    weight_R: Tensor  # combine weight, at least fp32; carries the task gradient to the router
    probs_TE: Tensor  # softmax over all experts, and the cheap ones
    rows_wanted: int  # pairs that the router chose, before any capacity limit
    load_balance_of: Callable[[], Tensor]  # the losses, worked out when they are asked for: in generation
    z_loss_of: Callable[[], Tensor]  # nobody asks, and they would take a third of the router's time
    loss_weight: float | None = None  # of load_balance_loss; None = what the criterion gives all of them
    all_ones: bool = False  # every weight_R is 1 and takes no gradient: no need to multiply
    # expert_R and its counts (E,), where the rows are in order of expert, and within one of token: no need to
    # sort. They hold for this very tensor, not for what `replace` puts in its place.
    in_order: tuple[Tensor, Tensor] | None = None
    active_E: Tensor | None = None  # bool, which of the experts are in use; None = all
    shared_experts: int = 0  # that compute every token, beside these rows
    num_cheap: int = 0  # of `probs_TE`, the last ones: their rows have been taken out (cheap.py)
    rows_cheap: int = 0  # so many
    finite: Tensor | None = None  # () 0, or NaN if a score is NaN or inf; None = the router has seen to it

    @cached_property
    def load_balance_loss(self) -> Tensor:
        """Scalar, differentiable, before any capacity limit."""
        with torch.autocast(self.probs_TE.device.type, enabled=False):
            return self.load_balance_of()

    @cached_property
    def z_loss(self) -> Tensor:
        """Scalar, differentiable."""
        with torch.autocast(self.probs_TE.device.type, enabled=False):
            return self.z_loss_of()

    @cached_property
    def entropy_loss(self) -> Tensor:
        """Scalar, differentiable: mean entropy of a token's probabilities in nats; 0 without tokens.

        The smaller, the fewer experts reach t together. Huang et al. 2024, arXiv 2403.07652.
        """
        probs_TE = self.probs_TE
        log_TE = probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log()  # of 0: without infinite gradient
        with torch.autocast(probs_TE.device.type, enabled=False):
            return -(probs_TE * log_TE).sum() / max(self.num_tokens, 1)

    @property
    def num_tokens(self) -> int:
        return self.probs_TE.size(0)

    @property
    def num_experts(self) -> int:
        return self.probs_TE.size(1) - self.num_cheap

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that compute a non-padding token, shared ones too; 0 without tokens."""
        rows = self.token_R.numel() + self.num_tokens * self.shared_experts
        return rows / max(self.num_tokens, 1)

    def combine_weights(self) -> Tensor:
        """Dense (T, E) weights, 0 where an expert was not chosen or dropped the token."""
        dense_TE = self.weight_R.new_zeros(self.num_tokens, self.num_experts)
        return dense_TE.index_put((self.token_R, self.expert_R), self.weight_R)

    def rows_per_expert(self) -> Tensor:
        """(E,) number of rows that each expert computes."""
        counts_E = self.counts_in_order
        return count(self.expert_R, self.num_experts) if counts_E is None else counts_E

    @property
    def counts_in_order(self) -> Tensor | None:
        """(E,) number of rows of each expert, if all rows of expert 0 come first, then those of 1, ..."""
        return self.in_order[1] if self.in_order and self.in_order[0] is self.expert_R else None


def count(expert_N: Tensor, num_experts: int) -> Tensor:
    """(E,) how often each expert occurs. Not torch.bincount, which makes a GPU wait for the host."""
    return expert_N.new_zeros(num_experts).scatter_add_(0, expert_N, torch.ones_like(expert_N))
