"""Mixture-of-Experts in plain torch: tokens -> router -> dispatch -> experts -> combine -> loss.

Nothing in here knows fairseq. Start reading at `layer.py`.
"""

from xmoe_fairseq.moe.budget import Budget, step_budgets
from xmoe_fairseq.moe.experts.experts import Experts
from xmoe_fairseq.moe.layer import MoELayer
from xmoe_fairseq.moe.records import moe_layers, record_routing
from xmoe_fairseq.moe.routers.base import Router
from xmoe_fairseq.moe.routers.base_assignment import BaseRouter
from xmoe_fairseq.moe.routers.expert_choice import ExpertChoiceRouter
from xmoe_fairseq.moe.routers.hash import HashRouter, balanced_table, random_table
from xmoe_fairseq.moe.routers.threshold import ThresholdRouter
from xmoe_fairseq.moe.routers.topk import TopKRouter
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.stats import RoutingStats

__all__ = [
    "BaseRouter",
    "Budget",
    "ExpertChoiceRouter",
    "Experts",
    "HashRouter",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingStats",
    "ThresholdRouter",
    "TopKRouter",
    "balanced_table",
    "moe_layers",
    "random_table",
    "record_routing",
    "step_budgets",
]
