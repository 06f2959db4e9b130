"""Registered criterions."""

from xmoe_fairseq.criterions.moe_adaptive_loss import MoEAdaptiveLoss
from xmoe_fairseq.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from xmoe_fairseq.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropyCriterion

__all__ = ["MoEAdaptiveLoss", "MoECrossEntropyCriterion", "MoELabelSmoothedCrossEntropyCriterion"]
