"""Mixture-of-Experts in plain torch: tokens -> router -> dispatch -> experts -> combine -> loss.

Nothing in here knows fairseq. Start reading at `layer.py`.
"""

from xmoe_fairseq.moe.experts import Experts
from xmoe_fairseq.moe.layer import MoELayer, record_routing
from xmoe_fairseq.moe.router import BaseRouter, Router, ThresholdRouter, TopKRouter
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.stats import RoutingStats

__all__ = [
    "BaseRouter",
    "Experts",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingStats",
    "ThresholdRouter",
    "TopKRouter",
    "record_routing",
]
