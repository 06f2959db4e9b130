"""Expert parallelism in fairseq's training: ranks that hold different experts, and still train one model."""

from xmoe_fairseq.parallel.groups import ExpertParallel, expert_parallel, spread_experts

__all__ = ["ExpertParallel", "expert_parallel", "spread_experts"]
