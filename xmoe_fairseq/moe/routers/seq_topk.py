"""Sequence-level top-k: the tokens of a sentence share its k experts per token."""

import torch
from torch import Tensor

from xmoe_fairseq.moe.routers.base import by_preference
from xmoe_fairseq.moe.routers.registry import register_router
from xmoe_fairseq.moe.routers.topk import TopKRouter
from xmoe_fairseq.moe.routing import Routing


@register_router("seq_topk")
class SeqTopKRouter(TopKRouter):
    """Of a sentence's n tokens the n * k most probable (token, expert) pairs; a token may get none or all.

    Wen et al. 2025 (SeqTopK), arXiv 2511.06494. Of equally probable pairs that of the earlier token, then of
    the lower expert. A token depends on later ones of its sentence, so this is not for causal models, but
    on no other sentence. `ids_T` is the number of each token's sentence.
    """

    description = "k on average: of its sentence's pairs the most probable; refused in decoders (SeqTopK)"
    is_causal = False
    takes_ones = takes_normalized = False
    goes_by_sentence = True

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        """Raises ValueError: without sentences."""
        if ids_T is None:
            raise ValueError("a seq_topk router needs each token's sentence: call the layer with token_ids")
        self._sentence_T = ids_T
        return super().forward(x_TD)

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        expert_TE = by_preference(probs_TE, self.num_experts)[1]
        return expert_TE, self.takes(probs_TE).gather(1, expert_TE)

    def takes(self, probs_TE: Tensor) -> Tensor:
        """(T, E) bool."""
        sentence_P = self._sentence_T.repeat_interleave(self.num_experts)  # of each of the P = T E pairs
        # Stable sorts from the least to the most important key: probability, sentence.
        order_P = torch.argsort(probs_TE.reshape(-1), descending=True, stable=True)
        order_P = order_P[torch.argsort(sentence_P[order_P], stable=True)]
        sentence_P = sentence_P[order_P]
        first_P = torch.searchsorted(sentence_P, sentence_P)  # where its sentence begins
        pairs_P = torch.searchsorted(sentence_P, sentence_P, right=True) - first_P
        place_P = torch.arange(len(order_P), device=order_P.device) - first_P
        taken_P = place_P * self.num_experts < pairs_P * self.k
        return torch.empty_like(taken_P).scatter_(0, order_P, taken_P).view_as(probs_TE)
