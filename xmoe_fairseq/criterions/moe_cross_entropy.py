"""moe_cross_entropy: fairseq's cross_entropy with the load-balance loss."""

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig

from xmoe_fairseq.criterions.moe_loss import MoELossConfig, MoELossMixin


@dataclass
class MoECrossEntropyCriterionConfig(MoELossConfig, CrossEntropyCriterionConfig):
    pass


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyCriterionConfig)
class MoECrossEntropyCriterion(MoELossMixin, CrossEntropyCriterion):
    def __init__(self, task: Any, sentence_avg: bool, moe_loss_coeff: float, moe_z_loss_coeff: float) -> None:
        super().__init__(task, sentence_avg)
        self.set_coefficients(moe_loss_coeff, moe_z_loss_coeff)
