"""Mixture-of-Experts in plain torch: tokens -> router -> dispatch -> experts -> combine -> loss.

Nothing in here knows fairseq. Start reading at `layer.py`.

A capital suffix is a tensor's shape: `probs_TE` is (T, E). Without one the shape varies, or it is no tensor.

    T  tokens on this rank, without padding       D  width of a token
    E  experts                                    F  hidden width of an expert
    R  routed (token, expert) pairs               K  choices of a token, the best first
    S  rows that the experts here read            W  ranks in all
    L  layers                                     N  ranks that share out the experts, or any number
    V  token ids                                  B, C  bins of a histogram, and all of its counts
    Z  cheap experts, behind the E                C  also constant ones among these
    O  rows that went to ranks                    P  pairs that came from ranks
"""

from xmoe_fairseq.moe.balance import step_balance
from xmoe_fairseq.moe.budget import Budget, step_budgets
from xmoe_fairseq.moe.cheap import CheapExperts
from xmoe_fairseq.moe.experts.experts import Experts
from xmoe_fairseq.moe.experts.kernels import register_kernel, use_kernel
from xmoe_fairseq.moe.layer import MoELayer
from xmoe_fairseq.moe.recompute import keep_scores
from xmoe_fairseq.moe.records import check_finite, moe_layers, record_routing
from xmoe_fairseq.moe.routed_layer import RoutedLayer
from xmoe_fairseq.moe.routers.base import Router, TokenRouter
from xmoe_fairseq.moe.routers.base_assignment import BaseRouter
from xmoe_fairseq.moe.routers.expert_choice import ExpertChoiceRouter
from xmoe_fairseq.moe.routers.expert_threshold import ExpertThresholdRouter, step_expert_thresholds
from xmoe_fairseq.moe.routers.hash import HashRouter, balanced_table, random_table
from xmoe_fairseq.moe.routers.registry import register_router
from xmoe_fairseq.moe.routers.relu import ReLURouter, step_sparsity
from xmoe_fairseq.moe.routers.seq_topk import SeqTopKRouter
from xmoe_fairseq.moe.routers.threshold import ThresholdRouter
from xmoe_fairseq.moe.routers.topany import TopAnyRouter, step_expert_pools
from xmoe_fairseq.moe.routers.topk import TopKRouter
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.stats import RoutingStats

__all__ = [
    "BaseRouter", "Budget", "CheapExperts", "ExpertChoiceRouter", "ExpertThresholdRouter", "Experts",
    "HashRouter", "MoELayer", "ReLURouter", "RoutedLayer", "Router", "Routing", "RoutingStats",
    "SeqTopKRouter", "ThresholdRouter", "TokenRouter", "TopAnyRouter", "TopKRouter", "balanced_table",
    "check_finite", "keep_scores", "moe_layers", "random_table", "record_routing", "register_kernel",
    "register_router", "step_balance", "step_budgets", "step_expert_pools", "step_expert_thresholds",
    "step_sparsity", "use_kernel",
]  # fmt: skip
