"""moe_adaptive_loss: fairseq's adaptive_loss (of an adaptive softmax) with the load-balance loss."""

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.distributed import utils

from xmoe_fairseq.criterions.moe_loss import MoELossConfig, MoELossMixin
from xmoe_fairseq_compat.errors import FlagError


@dataclass
class MoEAdaptiveLossConfig(MoELossConfig, AdaptiveLossConfig):
    pass


@register_criterion("moe_adaptive_loss", dataclass=MoEAdaptiveLossConfig)
class MoEAdaptiveLoss(MoELossMixin, AdaptiveLoss):
    of_adaptive_softmax = True

    def __init__(self, task: Any, sentence_avg: bool, moe_loss_coeff: float, moe_z_loss_coeff: float) -> None:
        super().__init__(task, sentence_avg)
        self.set_coefficients(moe_loss_coeff, moe_z_loss_coeff)

    @classmethod
    def build_criterion(cls, cfg: MoEAdaptiveLossConfig, task: Any) -> "MoEAdaptiveLoss":
        """fairseq's refuses pytorch_ddp, its default, in one process too, where there is no DDP.

        Raises:
            FlagError: on several ranks. A part of the vocabulary that a batch lacks has no gradient there.
        """
        backend = str(cfg.ddp_backend)
        if backend in ("c10d", "pytorch_ddp") and utils.get_global_world_size() > 1:
            raise FlagError(f"--criterion moe_adaptive_loss needs --ddp-backend legacy_ddp, got {backend}")
        return cls(task, cfg.sentence_avg, cfg.moe_loss_coeff, cfg.moe_z_loss_coeff)
