"""A compute budget: t of a threshold router, steered so that tokens take so many experts on average.

While it trains, a router counts for every further choice of a token the level that would take it (see
`rules.py`; for the paper's rule the mass before it, the probability of the better choices together), in a
histogram. That says what any t would have cost. After each update `step_budgets` moves t half of the way to
the one that would have met the budget. In evaluation t stays, so a token's experts depend on the token alone.

So tokens that are alike take equally many. Where many have the very same probabilities (a router whose
weight is 0, a batch of one repeated token) no t gives 1.5 experts: it is 1 or 2, and after a while a warning
says so.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe.rules import rule_named
from xmoe_fairseq.moe.steered import MANY, Steered, of_all_ranks

BINS = 1024  # of the histogram of levels, over [0, 1]; a choice: t to 0.001
TOKENS, TAKEN = BINS, BINS + 1  # places of what stands behind the bins
COUNTS = BINS + 2  # numbers in all: choices by their level, tokens, choices taken
# Of the way that t goes in one update; all of it in the first. At 0.1 t was 10 updates late while the router
# changed quickly, and a token took up to 4.9 experts for 4; at 0.5 up to 4.2.
RATE = 0.5
OFF = 0.1  # share of the target that a settled t may miss without a warning: a choice


class Budget(Steered):
    """The threshold t of one router, and the counts from which it is steered.

    t begins where no token can take more than B experts (`Rule.start`: a mass of floor(B) / E, or a
    probability of 1 / B): the budget holds from the first update on, whatever the data. `relative` has no
    such t; it begins at 0, with the most probable expert and those that equal it.

    In a state dict t is called `threshold`, of other rules than `mass` `threshold_RULE`: there it means
    something else.

    Args:
        target: experts per token B, on average over tokens.
        num_experts: number of experts E.
        rule: whose t it is.
    """

    def __init__(self, target: float, num_experts: int, rule: str = "mass") -> None:
        super().__init__(f"target_experts_per_token={target}", "step_budgets", COUNTS)
        self.target, self.rule = target, rule_named(rule)
        self.start = self.rule.start(target, num_experts)
        self.saved_as = "threshold" if rule == "mass" else f"threshold_{rule}"
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(self.start, dtype=torch.float32))
        self._missed: Tensor | None = None  # updates in a row, on the device of what is counted

    def take(self, value_TK: Tensor, counting: bool, costs_TK: Tensor | None = None) -> Tensor:
        """(T, K) bool: the choices that t allows; and count them, taken or not.

        Args:
            value_TK: by the rule.
            costs_TK: bool, whether a choice is of an expert that computes; None = all are.
        """
        taken_TK = self.rule.takes(value_TK, self.threshold)
        if counting:
            counts_C = self.counts(value_TK.device)
            # The first choice is taken anyway. NaN: an overflow on its way to the loss scaler.
            level_N = self.rule.level(value_TK[:, 1:]).nan_to_num(1.0).reshape(-1)
            bin_N = (level_N * BINS).long().clamp_(0, BINS - 1)
            counts_C[TOKENS] += value_TK.size(0)
            if costs_TK is None:
                counts_C.scatter_add_(0, bin_N, torch.ones_like(bin_N))
                counts_C[TAKEN] += taken_TK[:, 1:].sum()
                return taken_TK
            counts_C.scatter_add_(0, bin_N, costs_TK[:, 1:].reshape(-1).long())
            # A free first choice leaves room for one more: as a further one that any t takes, of -1 expert.
            free = (~costs_TK[:, 0]).sum()
            counts_C[0] -= free
            counts_C[TAKEN] += (taken_TK & costs_TK)[:, 1:].sum() - free
        return taken_TK

    def move(self, wanted: Tensor, counts_C: Tensor) -> None:
        """Bring t nearer to `wanted`; a layer without tokens keeps its t."""
        tokens = counts_C[TOKENS]
        self._look(wanted, 1 + counts_C[TAKEN] / tokens)
        rate = torch.where(self.threshold == self.start, 1.0, RATE)
        moved = (self.threshold + rate * (wanted - self.threshold)).clamp(0, 1)
        self.threshold.copy_(torch.where(tokens > 0, moved, self.threshold))

    def _look(self, wanted: Tensor, taken: Tensor) -> None:
        """Warn if t is settled and yet misses the target; the host asks once in a while, not in each step."""
        is_off = (taken - self.target).abs() > OFF * self.target
        is_settled = (wanted - self.threshold).abs() < 1 / BINS
        missed = torch.zeros_like(taken) if self._missed is None else self._missed.to(taken.device)
        self._missed = torch.where(is_off & is_settled, missed + 1, 0.0)
        if self._steps % MANY == 0 and self._missed >= MANY:
            warnings.warn(
                f"target_experts_per_token={self.target}: for {MANY} updates tokens have taken {taken:.2f} "
                "experts; so many have the same probabilities that no threshold lies between them",
                stacklevel=3,
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self.saved_as] = destination.pop(f"{prefix}threshold")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The t of another rule is none of ours."""
        threshold = state_dict.get(prefix + self.saved_as, self.threshold)
        for name in [name for name in state_dict if name.startswith(prefix)]:
            del state_dict[name]
        state_dict[f"{prefix}threshold"] = threshold
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"target={self.target}, threshold={self.threshold.item():.4f}"


def level_for(counts_LC: Tensor, target_L: Tensor) -> Tensor:
    """(L,) the level with which each layer's tokens would have taken `target_L` experts on average.

    Args:
        counts_LC: (L, COUNTS) of L layers, as `Budget.pop_counts` gives them.
    """
    return place_of((target_L - 1) * counts_LC[:, TOKENS].double(), counts_LC[:, :BINS])


def place_of(number_N: Tensor, counts_NB: Tensor) -> Tensor:
    """(N,) in [0, 1]: below which place so many of those that each histogram has counted lie."""
    number_N1, sum_NB = number_N.unsqueeze(1), counts_NB.cumsum(dim=1).double()  # of whole numbers: exact
    bin_N1 = torch.searchsorted(sum_NB, number_N1).clamp_(max=counts_NB.size(1) - 1)
    inside_N1 = counts_NB.gather(1, bin_N1).double()
    # Inside a bin they are taken to lie evenly.
    part_N1 = (number_N1 - (sum_NB.gather(1, bin_N1) - inside_N1)) / inside_N1.clamp(min=1)
    return ((bin_N1 + part_N1.clamp(0, 1)) / counts_NB.size(1)).squeeze(1)


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
    # Not torch.tensor of them all, for whose copy a GPU's host would wait.
    target_L = torch.stack([counts_LC.new_full((), b.target, dtype=torch.float64) for b in budgets])
    level_L = level_for(counts_LC, target_L).float()
    for budget, level, counts_C in zip(budgets, level_L, counts_LC, strict=True):
        budget.move(budget.rule.threshold(level), counts_C)
