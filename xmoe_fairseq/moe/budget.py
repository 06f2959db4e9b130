"""A compute budget: t of a threshold router, steered so that tokens take so many experts on average.

While it trains, a router counts for every further choice of a token the mass before it, the probability of
the better choices together, in a histogram. That says what any t would have cost. After each update
`step_budgets` moves t half of the way to the one that would have met the budget. In evaluation t stays, so
a token's experts depend on the token alone.

So tokens that are alike take equally many. Where many have the very same probabilities (a router whose
weight is 0, a batch of one repeated token) no t gives 1.5 experts: it is 1 or 2, and after a while a warning
says so.
"""

import math
import warnings

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe.steered import MANY, Steered, of_all_ranks

BINS = 1024  # of the histogram over [0, 1]; a choice: t to 0.001
TOKENS, TAKEN = BINS, BINS + 1  # places of what stands behind the bins
COUNTS = BINS + 2  # numbers in all: choices by the mass before them, tokens, choices taken
# Of the way that t goes in one update; all of it in the first. At 0.1 t was 10 updates late while the router
# changed quickly, and a token took up to 4.9 experts for 4; at 0.5 up to 4.2.
RATE = 0.5
OFF = 0.1  # share of the target that a settled t may miss without a warning: a choice


class Budget(Steered):
    """The threshold t of one router, and the counts from which it is steered.

    t begins at floor(target) / E. A token's B best experts have B/E of the probability at least, so it takes
    no more than B of them: the budget holds from the first update on, whatever the data.

    Args:
        target: experts per token B, on average over tokens.
        num_experts: number of experts E.
    """

    def __init__(self, target: float, num_experts: int) -> None:
        super().__init__(f"target_experts_per_token={target}", "step_budgets", COUNTS)
        self.target = target
        self.start = math.floor(target) / num_experts
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(self.start, dtype=torch.float32))
        self._missed = torch.zeros((), dtype=torch.long)  # updates in a row

    def take(self, mass_before_TK: Tensor, counting: bool) -> Tensor:
        """(T, K) bool: the choices that t allows; and count them, taken or not."""
        # A rounded sum may reach 1 before the last expert.
        taken_TK = (mass_before_TK < self.threshold) | (self.threshold >= 1)
        if counting:
            counts_C = self.counts(mass_before_TK.device)
            # The first choice is taken anyway. NaN: an overflow on its way to the loss scaler.
            bin_N = (mass_before_TK[:, 1:].nan_to_num(1.0) * BINS).long().clamp_(max=BINS - 1).reshape(-1)
            counts_C.scatter_add_(0, bin_N, torch.ones_like(bin_N))
            counts_C[TOKENS] += mass_before_TK.size(0)
            counts_C[TAKEN] += taken_TK[:, 1:].sum()
        return taken_TK

    def step(self, wanted: Tensor, counts_C: Tensor) -> None:
        """Move t towards `wanted`; a layer without tokens keeps its t."""
        tokens = counts_C[TOKENS]
        self._look(wanted, 1 + counts_C[TAKEN] / tokens)
        rate = torch.where(self.threshold == self.start, 1.0, RATE)
        moved = (self.threshold + rate * (wanted - self.threshold)).clamp(0, 1)
        self.threshold.copy_(torch.where(tokens > 0, moved, self.threshold))

    def _look(self, wanted: Tensor, taken: Tensor) -> None:
        """Warn if t is settled and yet misses the target; the host asks once in a while, not in each step."""
        is_off = (taken - self.target).abs() > OFF * self.target
        is_settled = (wanted - self.threshold).abs() < 1 / BINS
        self._missed = torch.where(is_off & is_settled, self._missed.to(taken.device) + 1, 0)
        if self._steps % MANY == 0 and self._missed >= MANY:
            warnings.warn(
                f"target_experts_per_token={self.target}: for {MANY} updates tokens have taken {taken:.2f} "
                "experts; so many have the same probabilities that no threshold lies between them",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        return f"target={self.target}, threshold={self.threshold.item():.4f}"


def threshold_for(counts_LC: Tensor, target_L: Tensor) -> Tensor:
    """(L,) the t with which each layer's tokens would have taken `target_L` experts on average.

    Args:
        counts_LC: (L, COUNTS) of L layers, as `Budget.pop_counts` gives them.
    """
    choices_LB, tokens_L = counts_LC[:, :BINS].double(), counts_LC[:, TOKENS].double()
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
    counts_LC = of_all_ranks(torch.stack([budget.pop_counts() for budget in budgets]))
    target_L = torch.tensor([budget.target for budget in budgets], device=counts_LC.device).double()
    wanted_L = threshold_for(counts_LC, target_L).float()
    for budget, wanted, counts_C in zip(budgets, wanted_L, counts_LC, strict=True):
        budget.step(wanted, counts_C)
