"""The registered criterions: fairseq's own, with the auxiliary losses of the MoE layers."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from xmoe_fairseq.criterions.moe_loss import MoELossConfig, MoELossMixin


@dataclass
class MoECrossEntropyCriterionConfig(MoELossConfig, CrossEntropyCriterionConfig):
    pass


@dataclass
class MoELabelSmoothedCrossEntropyCriterionConfig(MoELossConfig, LabelSmoothedCrossEntropyCriterionConfig):
    pass


@dataclass
class MoEAdaptiveLossConfig(MoELossConfig, AdaptiveLossConfig):
    pass


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyCriterionConfig)
class MoECrossEntropyCriterion(MoELossMixin, CrossEntropyCriterion):
    pass


@register_criterion("moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyCriterionConfig)
class MoELabelSmoothedCrossEntropyCriterion(MoELossMixin, LabelSmoothedCrossEntropyCriterion):
    pass


@register_criterion("moe_adaptive_loss", dataclass=MoEAdaptiveLossConfig)
class MoEAdaptiveLoss(MoELossMixin, AdaptiveLoss):
    of_adaptive_softmax = True
