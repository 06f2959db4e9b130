"""moe_label_smoothed_cross_entropy: fairseq's label_smoothed_cross_entropy with the load-balance loss."""

from dataclasses import dataclass
from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from xmoe_fairseq.criterions.moe_loss import MoELossConfig, MoELossMixin


@dataclass
class MoELabelSmoothedCrossEntropyCriterionConfig(MoELossConfig, LabelSmoothedCrossEntropyCriterionConfig):
    pass


@register_criterion("moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyCriterionConfig)
class MoELabelSmoothedCrossEntropyCriterion(MoELossMixin, LabelSmoothedCrossEntropyCriterion):
    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        label_smoothing: float,
        moe_loss_coeff: float,
        moe_z_loss_coeff: float,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
    ) -> None:
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.set_coefficients(moe_loss_coeff, moe_z_loss_coeff)
