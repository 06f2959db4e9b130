"""moe_adaptive_loss: fairseq's adaptive_loss (of an adaptive softmax) with the load-balance loss."""

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig

from xmoe_fairseq.criterions.moe_loss import MoELossConfig, MoELossMixin
from xmoe_fairseq_compat.adaptive import refuse_ddp


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
            FlagError: as `refuse_ddp`.
        """
        refuse_ddp("moe_adaptive_loss", cfg)
        return cls(task, cfg.sentence_avg, cfg.moe_loss_coeff, cfg.moe_z_loss_coeff)
