"""What keeps a router's experts evenly used (`--moe-balance`).

The choices of a token are counted here, the second and further ones too, before any capacity limit. Only
`first`, Switch's loss of losses.py, knows the first alone.
"""

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe.losses import share_loss
from xmoe_fairseq.moe.steered import Steered, step_each

BALANCES = ("first", "all", "global", "bias", "none")
STEP = 1e-3  # u of arXiv 2408.15664; there of probabilities, here of the scores before softmax


class Balance(nn.Module):
    """No loss, and nothing that is steered: `none`."""

    def count(self, rows_E: Tensor) -> None:
        """Take note of a call in training in which each expert was chosen so often."""

    def loss(self, probs_TE: Tensor, rows_E: Tensor) -> Tensor:
        """The auxiliary loss of one call; differentiable."""
        return probs_TE.sum() * 0.0


class AllChoices(Balance):
    """`E * sum_e f_e P_e`: f_e the expert's share of all choices of this call, P_e its mean probability.

    Switch's loss, of k choices (DeepSeekMoE, eq. 12-14, arXiv 2401.06066). 1 when the load is uniform.
    """

    def loss(self, probs_TE: Tensor, rows_E: Tensor) -> Tensor:
        return share_loss(probs_TE, rows_E.to(probs_TE.dtype) / rows_E.sum().clamp(min=1))


class CountsRows(Steered, Balance):
    """What is steered by how many rows each expert has had."""

    def __init__(self, name: str, start_E: Tensor, balance: str) -> None:
        super().__init__(f"balance={balance}", "step_balance", start_E.numel())
        self.register_buffer(name, start_E)

    def count(self, rows_E: Tensor) -> None:
        self.counts(rows_E.device).add_(rows_E)


class GlobalShare(CountsRows):
    """The same with f_e of a global batch: of all micro-batches and ranks. Qiu et al. 2025, arXiv 2501.11873.

    A micro-batch of few sentences need not be even in itself, so experts may specialise. f_e is that of the
    last update's batch: the share of the one that is being computed is known after its last micro-batch only.
    So all micro-batches of an update have the same f, and W ranks go as one with W times as many. (There, f
    is of the micro-batches up to the present one.) In the first update f is uniform, whose gradient is 0.
    """

    share_E: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__("share_E", torch.full((num_experts,), 1 / num_experts), "global")

    def loss(self, probs_TE: Tensor, rows_E: Tensor) -> Tensor:
        return share_loss(probs_TE, self.share_E)

    def step(self, rows_E: Tensor) -> None:
        """A layer without rows keeps its share."""
        rows = rows_E.sum()
        self.share_E.copy_(torch.where(rows > 0, rows_E / rows.clamp(min=1), self.share_E))


class LossFreeBias(CountsRows):
    """A bias on each expert's score where a token chooses, and no loss. Wang et al. 2024, arXiv 2408.15664.

    A token orders experts, and fills t, by softmax(z + b); their weights stay those of softmax(z). After each
    update an expert with fewer rows than the mean is raised by u, one with more is lowered (algorithm 1
    there). b has mean 0 here, as softmax passes over its mean. In evaluation it is fixed.
    """

    bias_E: Tensor

    def __init__(self, num_experts: int, step_size: float) -> None:
        super().__init__("bias_E", torch.zeros(num_experts), "bias")
        self.step_size = step_size

    def step(self, rows_E: Tensor) -> None:
        # E times the mean less E times the rows: whole numbers, whose sign no rounding can turn.
        moved_E = self.step_size * torch.sign(rows_E.sum() - rows_E.numel() * rows_E).float()
        self.bias_E.add_(moved_E - moved_E.mean())


def balance_named(name: str, num_experts: int, step: float = STEP) -> Balance | None:
    """None for `first`, which is the router's own loss.

    Args:
        step: u of `bias`.

    Raises:
        ValueError: there is no such balance; or step is not above 0.
    """
    if name not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {name}")
    if not step > 0:
        raise ValueError(f"step must be above 0, got {step}")
    if name in ("global", "bias"):
        return GlobalShare(num_experts) if name == "global" else LossFreeBias(num_experts, step)
    return {"first": None, "all": AllChoices(), "none": Balance()}[name]


def step_balance(model: nn.Module) -> None:
    """Move the state of every balance of `model`; to be called after each update (see `step_each`)."""
    step_each(model, CountsRows)
