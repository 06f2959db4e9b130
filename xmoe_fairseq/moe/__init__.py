"""Mixture-of-Experts in plain torch: tokens -> router -> dispatch -> experts -> combine -> loss.

Nothing in here knows fairseq. Start reading at `layer.py`.
"""

from xmoe_fairseq.moe.base_router import BaseRouter
from xmoe_fairseq.moe.budget import Budget, step_budgets
from xmoe_fairseq.moe.expert_choice import ExpertChoiceRouter
from xmoe_fairseq.moe.experts import Experts
from xmoe_fairseq.moe.hash_router import HashRouter, balanced_table, random_table
from xmoe_fairseq.moe.layer import MoELayer
from xmoe_fairseq.moe.records import moe_layers, record_routing
from xmoe_fairseq.moe.router import Router, TopKRouter
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.stats import RoutingStats
from xmoe_fairseq.moe.threshold_router import ThresholdRouter

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
