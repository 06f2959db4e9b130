"""A compute budget: t of a threshold router, steered so that tokens take so many experts on average.

While it trains, a router counts for every further choice of a token the mass before it, the probability of
the better choices together, in a histogram. That says what any t would have cost. After each update
`step_budgets` moves t a little towards the one that would have met the budget. In evaluation t stays, so a
token's experts depend on the token alone.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BINS = 1024  # of the histogram over [0, 1]
RATE = 0.5  # of the way that t goes in one update; all of it in the first


class Budget(nn.Module):
    """The threshold t of one router, and the counts from which it is steered.

    t begins at floor(target) / E. A token's B best experts have B/E of the probability at least, so it takes
    no more than B of them: the budget holds from the first update on, whatever the data.

    Args:
        target: experts per token B, on average over tokens.
        num_experts: number of experts E.
    """

    def __init__(self, target: float, num_experts: int) -> None:
        super().__init__()
        self.target = target
        self.start = math.floor(target) / num_experts
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(self.start, dtype=torch.float32))
        self.counting = True  # off for batches that do not count, such as a rank's dummy batch
        # Not a buffer: each rank has its own, and none is worth saving.
        self._counts_B: Tensor | None = None  # choices by the mass before them; last, the number of tokens

    def take(self, mass_before_TK: Tensor) -> Tensor:
        """(T, K) bool: the choices that t allows. In training they are counted, taken or not."""
        if self.training and self.counting:
            self.count(mass_before_TK)
        # A rounded sum may reach 1 before the last expert.
        return (mass_before_TK < self.threshold) | (self.threshold >= 1)

    def count(self, mass_before_TK: Tensor) -> None:
        if self._counts_B is None:
            self._counts_B = mass_before_TK.new_zeros(BINS + 1, dtype=torch.long)
        # The first choice is taken anyway.
        bin_N = (mass_before_TK[:, 1:] * BINS).long().clamp_(max=BINS - 1).reshape(-1)
        self._counts_B.scatter_add_(0, bin_N, torch.ones_like(bin_N))
        self._counts_B[BINS] += mass_before_TK.size(0)

    def pop_counts(self) -> Tensor:
        """(BINS + 1,) what was counted since the last time."""
        counts_B, self._counts_B = self._counts_B, None
        if counts_B is None:
            return torch.zeros(BINS + 1, dtype=torch.long, device=self.threshold.device)
        return counts_B.to(self.threshold.device)

    def step(self, wanted: Tensor, tokens: Tensor) -> None:
        """Move t towards `wanted`; a layer without tokens keeps its t."""
        rate = torch.where(self.threshold == self.start, 1.0, RATE)
        moved = (self.threshold + rate * (wanted - self.threshold)).clamp(0, 1)
        self.threshold.copy_(torch.where(tokens > 0, moved, self.threshold))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Budget":
        """`half()` and `bfloat16()` leave t in fp32; it only moves to the device."""
        exact = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.threshold = exact.to(self.threshold.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The checkpoint of a model that was trained without a budget has no t: it begins here."""
        state_dict.setdefault(f"{prefix}threshold", self.threshold)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"target={self.target}, threshold={self.threshold.item():.4f}"


def threshold_for(counts_LB: Tensor, target_L: Tensor) -> Tensor:
    """(L,) the t with which each layer's tokens would have taken `target_L` experts on average.

    Args:
        counts_LB: (L, BINS + 1) of L layers, as `Budget.pop_counts` gives them.
    """
    choices_LB, tokens_L = counts_LB[:, :-1].double(), counts_LB[:, -1].double()
    further_L1 = ((target_L - 1) * tokens_L).unsqueeze(1)
    sum_LB = choices_LB.cumsum(dim=1)
    bin_L1 = torch.searchsorted(sum_LB, further_L1).clamp_(max=BINS - 1)
    inside_L1 = choices_LB.gather(1, bin_L1)
    # Inside a bin the choices are taken to lie evenly.
    part_L1 = (further_L1 - (sum_LB.gather(1, bin_L1) - inside_L1)) / inside_L1.clamp(min=1)
    return ((bin_L1 + part_L1.clamp(0, 1)) / BINS).squeeze(1)


@torch.no_grad()
def step_budgets(model: nn.Module) -> None:
    """Steer every budget of `model` by what was counted since the last time; to be called after each update.

    With torch.distributed the counts of all ranks are added up in one exchange, which all ranks must enter:
    W ranks then go as one that saw all the tokens.
    """
    budgets = [module for module in model.modules() if isinstance(module, Budget)]
    if not budgets:
        return
    counts_LB = torch.stack([budget.pop_counts() for budget in budgets])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_LB)
    target_L = torch.tensor([budget.target for budget in budgets], device=counts_LB.device).double()
    wanted_L = threshold_for(counts_LB, target_L).float()
    for budget, wanted, tokens in zip(budgets, wanted_L, counts_LB[:, -1], strict=True):
        budget.step(wanted, tokens)
