"""Registered criterions."""

from xmoe_fairseq._requirements import check_requirements

check_requirements()  # before fairseq is imported, to name what is missing

from xmoe_fairseq.criterions.moe_adaptive_loss import MoEAdaptiveLoss  # noqa: E402
from xmoe_fairseq.criterions.moe_cross_entropy import MoECrossEntropyCriterion  # noqa: E402
from xmoe_fairseq.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropyCriterion  # noqa: E402

__all__ = ["MoEAdaptiveLoss", "MoECrossEntropyCriterion", "MoELabelSmoothedCrossEntropyCriterion"]
