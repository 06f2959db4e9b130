"""Which of a layer's experts are in use, where they are added and removed while it trains."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.steered import Steered

CLOSED = -1e9  # the score of one that is not in use: its probability is exactly 0, sums of scores are finite


class ExpertPool(Steered):
    """Between two checks it records how many tokens each expert got, and the sum of the tokens that passed no
    threshold. At a check experts without a token go; then, if some tokens passed none, the first expert that
    is not in use comes. Its vector is the direction of that sum, its threshold 0, its FFN what it was: as
    drawn, or as when it went.

    All ranks' tokens are recorded, and the records lie in checkpoints.
    Guo et al. 2024 (DynMoE), section 3.2, arXiv 2405.14297.

    Args:
        num_experts: E, the most there can be.
        initial: so many are in use at first.
        every: updates from check to check, of those in which the layer had tokens; 0 = there is none.

    Raises:
        ValueError: one of them is out of range.
    """

    active_E: Tensor
    updates: Tensor
    tokens_E: Tensor
    unserved_D: Tensor

    def __init__(self, model_dim: int, num_experts: int, initial: int, every: int) -> None:
        asked = f"adapt_experts_every={every}"
        super().__init__(asked, "step_expert_pools", num_experts + model_dim, torch.float64)
        if every < 0 or every != int(every):
            raise ValueError(f"adapt_experts_every must be 0 (never) or a whole number, got {every}")
        if not 1 <= initial <= num_experts or (initial < num_experts and not every):
            rule = f"must be from 1 to num_experts = {num_experts}, and so many unless some may be added"
            raise ValueError(f"initial_experts {rule}, got {initial}")
        self.every = every
        self.register_buffer("active_E", torch.arange(num_experts) < initial)
        self.register_buffer("updates", torch.zeros(()))
        self.register_buffer("tokens_E", torch.zeros(num_experts, dtype=torch.float64))
        self.register_buffer("unserved_D", torch.zeros(model_dim, dtype=torch.float64))

    def count(self, tokens_E: Tensor, x_TD: Tensor, unserved_T: Tensor) -> None:
        """Take note of a call in training, and of which of its tokens passed no threshold."""
        x_TD = torch.where(unserved_T.unsqueeze(1), x_TD.detach(), 0.0)
        x_TD = x_TD.nan_to_num(0.0, 0.0, 0.0)  # an overflow on its way to the loss scaler
        self.counts(x_TD.device).add_(torch.cat([tokens_E, x_TD.sum(dim=0, dtype=torch.float64)]))

    def check(self, counts_C: Tensor) -> tuple[Tensor, Tensor]:
        """By what all ranks have counted in an update: (E,) bool, which expert comes, and (D,) its vector."""
        tokens_E, unserved_D = counts_C.split([self.tokens_E.numel(), self.unserved_D.numel()])
        self.tokens_E += tokens_E
        self.unserved_D += unserved_D
        had_tokens = tokens_E.any()
        self.updates += had_tokens
        is_due = had_tokens & (self.updates % self.every == 0)
        stays_E = self.active_E & (self.tokens_E > 0)
        comes_E = is_due & self.unserved_D.any() & ~stays_E & ((~stays_E).cumsum(dim=0) == 1)
        vector_D = F.normalize(self.unserved_D, dim=0)
        self.active_E.copy_(torch.where(is_due, stays_E | comes_E, self.active_E))
        self.tokens_E.masked_fill_(is_due, 0.0)
        self.unserved_D.masked_fill_(is_due, 0.0)
        return comes_E, vector_D
