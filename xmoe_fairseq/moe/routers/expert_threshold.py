"""Expert thresholds: a token takes every expert whose own threshold its score reaches."""

from statistics import NormalDist

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe.budget import BINS, place_of
from xmoe_fairseq.moe.routers.expert_choice import ExpertChoiceRouter
from xmoe_fairseq.moe.routers.registry import Flag, Place, register_router
from xmoe_fairseq.moe.routers.topk import TOPK, experts_per_token
from xmoe_fairseq.moe.steered import Steered, step_each

# As a budget's rate: with the paper's 0.99 thresholds were 100 updates late (docs/departures.md).
DECAY = 0.5

THRESHOLD_DECAY = Flag(
    "moe_threshold_decay", DECAY, "d of the moving average of each expert's threshold: d times the old one "
    "and 1 - d times that which would have fitted the last update; the paper's is 0.99",
    rule="must be in [0, 1)", holds=lambda config: 0 <= config.moe_threshold_decay < 1,
    refused_elsewhere=True,
)  # fmt: skip
EXPERT_CHOICE_UPDATES = Flag(
    "moe_expert_choice_updates", 100, "in so many first updates of training, while scores change too quickly "
    "for thresholds, an expert takes its best tokens of the batch, so tokens depend on later ones; 0 = none",
    rule="must be 0 or more", holds=lambda config: config.moe_expert_choice_updates >= 0,
    refused_elsewhere=True,
)  # fmt: skip


class ExpertThresholds(Steered):
    """The threshold c_e of each expert of a layer: above it lie k / E of the tokens' scores, on average.

    After each update `c_e = d c_e + (1 - d) q_e`: q_e is the score above which that share of all tokens of
    all ranks and micro-batches lay, by a histogram of each expert. It is divided by 1 - d^n after n updates,
    so that c_e begins as the first q_e.
    """

    threshold_E: Tensor
    updates: Tensor

    def __init__(self, num_experts: int, share: float, decay: float) -> None:
        super().__init__("router expert_threshold", "step_expert_thresholds", num_experts * BINS)
        self.share, self.decay = share, decay
        self.register_buffer("threshold_E", torch.zeros(num_experts))
        self.register_buffer("updates", torch.zeros(()))  # no whole number: checkpoints may be averaged

    def count(self, score_TE: Tensor) -> None:
        """By place z / (1 + |z|): fine where scores are small, and no score lies outside."""
        place_TE = 0.5 + 0.5 * score_TE / (1 + score_TE.abs())
        bin_TE = (place_TE.nan_to_num(1.0) * BINS).long().clamp_(0, BINS - 1)  # NaN: on its way to the scaler
        bin_TE += BINS * torch.arange(score_TE.size(1), device=score_TE.device)
        self.counts(score_TE.device).scatter_add_(0, bin_TE.view(-1), torch.ones_like(bin_TE).view(-1))

    def step(self, counts_C: Tensor) -> None:
        """A layer without tokens keeps its thresholds."""
        counts_EB = counts_C.view(-1, BINS)
        tokens_E = counts_EB.sum(dim=1)
        place_E = place_of(tokens_E * (1 - self.share), counts_EB).clamp(0.5 / BINS, 1 - 0.5 / BINS)
        signed_E = 2 * place_E - 1
        score_E = signed_E / (1 - signed_E.abs())
        updates = self.updates + 1
        rate = (1 - self.decay) / (1 - self.decay ** updates.double())
        moved_E = torch.lerp(self.threshold_E.double(), score_E, rate).float()
        self.threshold_E.copy_(torch.where(tokens_E > 0, moved_E, self.threshold_E))
        self.updates.copy_(torch.where(tokens_E[0] > 0, updates, self.updates))


def step_expert_thresholds(model: nn.Module) -> None:
    """Move the thresholds of all experts of `model`; to be called after each update (see `step_each`)."""
    step_each(model, ExpertThresholds)


@register_router("expert_threshold")
class ExpertThresholdRouter(ExpertChoiceRouter):
    """A token takes every expert with z_e >= c_e, perhaps none; weight sigmoid(z_e), not normalised.

    Sun et al. 2026, arXiv 2603.11535. z are the scores, c_e is steered so that an expert takes k / E of all
    tokens (`ExpertThresholds`): the load is even, and there is no auxiliary loss. In evaluation c is fixed,
    so a token's experts depend on the token alone. Before the first update c_e is what would be right for
    tokens whose D numbers are independent with variance 1, as LayerNorm nearly makes them.

    Args:
        experts_per_token: k, the mean number of experts per token, in (0, E].
        expert_choice_updates: in so many first updates of a training the experts choose among the batch's
            tokens instead (by z), so that a token depends on later ones.
        decay: d, in [0, 1).

    Raises:
        ValueError: one of them is out of range.
    """

    description = "none to all: those whose threshold, steered to an even load, its score reaches (ET)"
    depends_on_batch = "in the first updates of training"
    is_causal = True
    takes_normalized = False
    flags = (TOPK, THRESHOLD_DECAY, EXPERT_CHOICE_UPDATES)

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        experts_per_token: float = 1.0,
        expert_choice_updates: int = 0,
        decay: float = DECAY,
    ) -> None:
        super().__init__(model_dim, num_experts, experts_per_token)
        if expert_choice_updates < 0:
            raise ValueError(f"expert_choice_updates must be 0 or more, got {expert_choice_updates}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.expert_choice_updates = expert_choice_updates
        self.thresholds = ExpertThresholds(num_experts, experts_per_token / num_experts, decay)

    @classmethod
    def from_config(cls, place: Place) -> "ExpertThresholdRouter":
        config = place.config
        steering = (config.moe_expert_choice_updates, config.moe_threshold_decay)
        return cls(place.model_dim, place.num_experts, experts_per_token(config), *steering)

    @classmethod
    def after_update(cls, model: nn.Module) -> None:
        step_expert_thresholds(model)

    @property
    def threshold_in_use_E(self) -> Tensor:
        start = NormalDist().inv_cdf(1 - min(self.thresholds.share, 1 - 1e-9)) / self.temperature
        start_E = self.weight.detach().float().norm(dim=1) * start
        return torch.where(self.thresholds.updates > 0, self.thresholds.threshold_E, start_E)

    def to_log(self) -> dict[str, Tensor | float]:
        return {"threshold": self.threshold_in_use_E.mean()}

    def takes(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        if self.training and self.counting:
            self.thresholds.count(logits_TE)
        choosing = self.training and self.expert_choice_updates  # only then a GPU's host waits for `updates`
        if choosing and self.thresholds.updates < self.expert_choice_updates:
            return self.best_of_batch(logits_TE)
        return logits_TE >= self.threshold_in_use_E

    def combine_weight(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        return torch.sigmoid(logits_TE)
