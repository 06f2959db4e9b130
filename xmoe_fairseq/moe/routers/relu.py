"""ReMoE's router: a token takes every expert whose score is positive, and the score is its weight."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe.expert_order import of_rows
from xmoe_fairseq.moe.native.routing import Chosen
from xmoe_fairseq.moe.routers.base import Router
from xmoe_fairseq.moe.routers.registry import Place, register_router
from xmoe_fairseq.moe.routers.topk import TOPK, check_average, check_topk, experts_per_token
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.steered import Steered, of_all_ranks

START, STEP = 1e-8, 1.2  # lambda_0 and alpha of the paper, section 3.3


class Sparsity(Steered):
    """lambda, the weight of a ReLU router's loss; steered towards so many experts per token."""

    l1_coeff: Tensor

    def __init__(self, target: float) -> None:
        super().__init__(f"experts_per_token={target}", "step_sparsity", 2)  # rows, tokens
        self.target = target
        self.register_buffer("l1_coeff", torch.tensor(START))


@register_router("relu")
class ReLURouter(Router):
    """r = ReLU(x W^T): a token takes the experts with r_e > 0, perhaps none, and r_e is their weight.

    A choice begins and ends with the weight 0, so all is differentiable. How many experts tokens take follows
    from the loss `lambda (E / (k T)) sum_e n_e mean_t r_te`, n_e the tokens of expert e: an L1 norm that
    weighs most where an expert is taken most, so it keeps them evenly used, too. lambda begins at 1e-8; after
    each update it grows by a factor of 1.2 if the tokens of all ReLU layers together took more than k experts
    on average, else it falls (`step_sparsity`). So the first hundred updates cost more than k experts, at
    first half of all. In evaluation a token's experts depend on the token alone.
    Wang et al. 2024 (ReMoE), eq. 5 to 10, arXiv 2412.14711.

    A token's experts have no order, so `rank_R` is 0: a capacity limit keeps the largest weights. `probs_TE`,
    for statistics, is the softmax of the scores, as with other routers.

    Args:
        experts_per_token: k, in (0, E]; lambda is steered towards it.
    """

    description = "ReMoE: those of positive score, on average k after some hundred updates, perhaps none"
    has_own_loss = weighs_own_loss = True
    flags = (TOPK,)
    check = staticmethod(check_topk)

    def __init__(self, model_dim: int, num_experts: int, experts_per_token: float = 1.0) -> None:
        super().__init__(model_dim, num_experts)
        check_average(experts_per_token, num_experts)
        self.sparsity = Sparsity(experts_per_token)

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        return "about ", experts_per_token(config)

    @classmethod
    def from_config(cls, place: Place) -> "ReLURouter":
        return cls(place.model_dim, place.num_experts, experts_per_token(place.config))

    @classmethod
    def after_update(cls, model: nn.Module) -> None:
        step_sparsity(model)

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        return replace(super().forward(x_TD, ids_T), loss_weight=1.0)

    def choose_plainly(self, logits_TE: Tensor) -> Chosen:
        positive_ET = (logits_TE.detach() > 0).t()
        expert_R, token_R = positive_ET.nonzero(as_tuple=True)  # in order of expert
        weight_R = of_rows(logits_TE, token_R, expert_R)
        probs_TE, first_T = torch.softmax(logits_TE, dim=-1), logits_TE.argmax(dim=1)
        rank_R, rows_E = torch.zeros_like(expert_R), positive_ET.sum(dim=1)
        return Chosen(probs_TE, weight_R, token_R, expert_R, rank_R, first_T, rows_E)

    def balance_of(self, chosen: Chosen) -> Callable[[], Tensor]:
        assert chosen.counts_E is not None
        num_tokens = chosen.probs_TE.size(0)
        if self.training and self.counting:
            counts_C = self.sparsity.counts(chosen.expert_R.device)
            counts_C[0] += chosen.expert_R.numel()
            counts_C[1] += num_tokens
        return partial(self.l1_loss, chosen.weight_R, chosen.counts_E[chosen.expert_R], num_tokens)

    def l1_loss(self, weight_R: Tensor, rows_R: Tensor, num_tokens: int) -> Tensor:
        """0 without tokens.

        Args:
            rows_R: how many rows the expert of each row has.
        """
        norm = torch.dot(weight_R, rows_R.to(weight_R.dtype)) / max(num_tokens, 1) ** 2
        return self.sparsity.l1_coeff * (self.num_experts / self.sparsity.target) * norm

    def to_log(self) -> dict[str, Tensor | float]:
        return {"l1_coeff": self.sparsity.l1_coeff}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts_per_token={self.sparsity.target}"


@torch.no_grad()
def step_sparsity(model: nn.Module) -> None:
    """Move lambda of every ReLU router of `model`; to be called after each update.

    One factor for all, by the experts per token of all layers and ranks together, which is one exchange that
    all ranks must enter. lambda stays above its start, where it has no effect: from 0 it could not return.
    """
    steered = [module for module in model.modules() if isinstance(module, Sparsity)]
    if not steered:
        return
    counts_LC = of_all_ranks(torch.stack([each.pop_counts() for each in steered])).double()
    target_L = torch.stack([counts_LC.new_full((), each.target) for each in steered])
    rows, wanted = counts_LC[:, 0].sum(), (target_L * counts_LC[:, 1]).sum()
    factor = torch.where(wanted > 0, torch.where(rows > wanted, STEP, 1 / STEP), 1.0).float()
    for each in steered:
        each.l1_coeff.mul_(factor).clamp_(START, 1 / START)
