"""The --moe-* flags of a model. What they must satisfy is in config.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fairseq.dataclass import FairseqDataclass

from xmoe_fairseq.moe.layer import COMBINE
from xmoe_fairseq_compat.errors import flag

__all__ = [
    "COMBINE",
    "HASH_TABLES",
    "OWN_CAPACITY",
    "ROUTERS",
    "WITHOUT_SCORES",
    "MoEConfig",
    "flag",
    "read_field",
]

ROUTERS = ("threshold", "topk", "hash", "base", "expert_choice", "gshard")
HASH_TABLES = ("balanced", "random")
OWN_CAPACITY = ("expert_choice", "gshard")  # routers whose method includes a capacity
WITHOUT_SCORES = ("hash", "gshard")  # routers that score nothing, or in another's code


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MoEConfig(FairseqDataclass):
    """Fields that the dataclasses of both models inherit; fairseq turns them into flags."""

    moe_freq: int = _flag(2, "every Nth layer is an MoE layer (counted from 1); 0 = dense model")
    no_moe_encoder: bool = _flag(False, "keep the encoder dense")
    no_moe_decoder: bool = _flag(False, "keep the decoder dense")
    moe_router: str = _flag(
        "threshold", "how a token chooses experts: threshold (XMoE), topk (k=1: Switch), hash (by its id), "
        "base (BASE layers), expert_choice (experts choose tokens; encoder only), gshard (fairscale's layer)"
    )  # fmt: skip
    moe_num_experts: int = _flag(32, "number of experts E in an MoE layer, after the split")
    moe_ffn_split: int = _flag(4, "s: an expert is 1/s as wide as the dense FFN (--*-ffn-embed-dim / s)")
    moe_threshold: float = _flag(
        0.9, "threshold router: a token takes experts until their probabilities reach this mass, in [0, 1]; "
        "0 = one expert, 1 = all"
    )  # fmt: skip
    moe_topk: int = _flag(
        0, "topk router: experts per token, expert_choice router: the same on average (its paper's capacity "
        "factor); 0 = --moe-ffn-split, the FLOPs of the dense FFN"
    )  # fmt: skip
    moe_hash_table: str = _flag(
        "balanced", "hash router: balanced (frequent tokens to the least loaded expert, by the dictionary's "
        "counts) or random"
    )  # fmt: skip
    moe_layer_thresholds: str = _flag(
        "", "threshold router: t of each MoE layer instead, the encoder's first, such as 0.4,0.6,0.5"
    )
    moe_target_experts_per_token: float = _flag(
        0.0, "threshold router: in training steer each layer's t, from a low start, so that a token takes so "
        "many experts on average; --moe-threshold then counts for nothing; 0 = off"
    )  # fmt: skip
    moe_max_experts_per_token: int = _flag(
        -1, "threshold router: keep only a token's first choices; 0 = no limit, "
        "-1 = 2 x --moe-ffn-split, so never more than twice the dense FFN"
    )  # fmt: skip
    moe_router_temperature: float = _flag(
        1.0,
        "divides a router's scores, in training and evaluation; below 1 = more decisive from the start; "
        "1e-6 to 1e6",
    )
    moe_router_init_scale: float = _flag(1.0, "multiplies a router's initial weight; 1e-6 to 1e6")
    moe_combine: str = _flag(
        "probs", "threshold and topk router: a chosen expert's output counts as often as it is probable "
        "(probs), or once (ones; what xmoe-convert makes of a dense model)"
    )  # fmt: skip
    moe_capacity_factor: float = _flag(
        0.0, "in training an expert keeps at most ceil(tokens / experts x this) tokens; 0 = dropless"
    )
    moe_eval_capacity_factor: float = _flag(
        0.0, "the same in evaluation; other than 0 results depend on the batch and a decoder is not causal"
    )
    moe_min_capacity: int = _flag(4, "with a capacity factor: an expert may always keep this many tokens")
    moe_expert_parallel_size: int = _flag(
        1, "N: share out the experts among N ranks, E/N on each; 1 = every rank holds all, -1 = all ranks; "
        "must divide the number of ranks and --moe-num-experts"
    )  # fmt: skip
    moe_sharded_checkpoints: bool = _flag(
        False, "--moe-expert-parallel-size: each rank saves its experts in a file of its own, for models "
        "too large for one; xmoe-checkpoint merge makes one file of them"
    )  # fmt: skip

    @property
    def experts_per_token_limit(self) -> int:
        return (
            2 * self.moe_ffn_split if self.moe_max_experts_per_token == -1 else self.moe_max_experts_per_token
        )

    @property
    def most_experts_per_token(self) -> int:
        return min(self.experts_per_token_limit or self.moe_num_experts, self.moe_num_experts)

    @property
    def layer_thresholds(self) -> list[float]:
        """Raises ValueError if one is no number."""
        return [float(t) for t in self.moe_layer_thresholds.split(",")] if self.moe_layer_thresholds else []

    @property
    def k(self) -> int:
        return self.moe_topk or self.moe_ffn_split

    def has_experts(self, side: str) -> bool:
        return bool(self.moe_freq) and not getattr(self, f"no_moe_{side}")


def read_field(model_cfg: Any, name: str, default: Any) -> Any:
    value = model_cfg.get(name) if isinstance(model_cfg, Mapping) else getattr(model_cfg, name, None)
    value = default if value is None else value
    return value.value if isinstance(value, Enum) else value
