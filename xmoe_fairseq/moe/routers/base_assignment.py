"""The router of BASE layers, for comparison."""

from typing import Any

import torch
from torch import Tensor

from xmoe_fairseq.moe.routers.base import Router
from xmoe_fairseq.moe.routers.registry import register_router


@register_router("base")
class BaseRouter(Router):
    """BASE layers: one expert per token, weight sigmoid(score), no auxiliary loss.

    In training tokens are assigned so that every expert gets ceil(T/E) at most and the sum of scores is
    largest; in evaluation each token takes its best expert. Lewis et al. 2021, arXiv 2103.16716.
    """

    description = "one, with a balanced assignment in training, the best in evaluation (BASE layers)"
    depends_on_batch = "in training"
    needs_balance_loss = False
    flags = ()

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        return "", 1

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, None]:
        expert_T = balanced_assignment(logits_TE) if self.training else logits_TE.argmax(dim=-1)
        return expert_T.unsqueeze(1), None

    def combine_weight(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        return torch.sigmoid(logits_TE)


def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """(T,) expert of each token: the assignment of largest total score with at most ceil(T/E) per expert.

    Exact (scipy's linear sum assignment on the host), about cubic in T: for study, not for large batches.
    """
    from scipy.optimize import linear_sum_assignment  # only this router needs scipy

    num_tokens, num_experts = scores_TE.shape
    slots = -(-num_tokens // num_experts)
    # nan_to_num: an overflow on its way to the loss scaler.
    scores = scores_TE.cpu().double().nan_to_num().numpy()
    column_of_expert = scores.repeat(slots, axis=1)  # column c is expert c // slots
    _, column_T = linear_sum_assignment(column_of_expert, maximize=True)
    return torch.as_tensor(column_T // max(slots, 1), device=scores_TE.device)
