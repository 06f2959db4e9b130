"""The --moe-* flags of a model, and what they must satisfy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from fairseq.dataclass import FairseqDataclass

from xmoe_fairseq.moe.layer import COMBINE

ROUTERS = ("threshold", "topk", "hash", "base", "expert_choice", "gshard")
HASH_TABLES = ("balanced", "random")
OWN_CAPACITY = ("expert_choice", "gshard")  # routers whose method includes a capacity


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
    moe_max_experts_per_token: int = _flag(
        -1, "threshold router: keep only a token's first choices; 0 = no limit, "
        "-1 = 2 x --moe-ffn-split, so never more than twice the dense FFN"
    )  # fmt: skip
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
    def layer_thresholds(self) -> list[float]:
        """Raises ValueError if one is no number."""
        return [float(t) for t in self.moe_layer_thresholds.split(",")] if self.moe_layer_thresholds else []

    @property
    def k(self) -> int:
        return self.moe_topk or self.moe_ffn_split

    def has_experts(self, side: str) -> bool:
        return bool(self.moe_freq) and not getattr(self, f"no_moe_{side}")


def read_moe_config(model_cfg: Any, sides: tuple[str, ...]) -> MoEConfig:
    """The checked MoE fields of a model's complete configuration (DictConfig or Namespace).

    fairseq hands `build_model` whatever the command line, hydra, a checkpoint or --model-overrides left
    there, so this is the one place that all of them pass.

    Args:
        sides: "encoder", "decoder" or both: what the model has.

    Raises:
        ValueError: a value that breaks a rule; names the flag, the rule and the value.
    """
    defaults = {f.name: f.default for f in fields(MoEConfig) if f.name != "_name"}
    values = {name: read_field(model_cfg, name, default) for name, default in defaults.items()}
    config = MoEConfig(**values)
    for name, default in defaults.items():
        _check_type(name, values[name], default)
    for name, (rule, holds) in _RULES.items():
        if not holds(config):
            raise ValueError(f"{flag(name)} {rule}, got {getattr(config, name)}")
    _check_router(config)
    _check_thresholds(config, sides, model_cfg)
    for side in sides:
        if config.has_experts(side):
            _check_side(config, side, model_cfg)
    return config


def read_field(model_cfg: Any, name: str, default: Any) -> Any:
    value = model_cfg.get(name) if isinstance(model_cfg, Mapping) else getattr(model_cfg, name, None)
    value = default if value is None else value
    return value.value if isinstance(value, Enum) else value


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_type(name: str, value: Any, default: Any) -> None:
    kind = type(default)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{flag(name)} must be of type {kind.__name__}, got {value!r}")


_RULES: dict[str, tuple[str, Callable[[MoEConfig], bool]]] = {
    "moe_freq": ("must be 0 (dense) or more", lambda c: c.moe_freq >= 0),
    "moe_router": (f"must be one of {', '.join(ROUTERS)}", lambda c: c.moe_router in ROUTERS),
    "moe_num_experts": ("must be at least 1", lambda c: c.moe_num_experts >= 1),
    "moe_ffn_split": ("must be at least 1", lambda c: c.moe_ffn_split >= 1),
    "moe_threshold": ("must be in [0, 1]", lambda c: 0 <= c.moe_threshold <= 1),
    "moe_topk": (
        "must be 0 (= --moe-ffn-split) or more, and only --moe-router topk and expert_choice take it",
        lambda c: c.moe_topk >= 0 and (c.moe_topk == 0 or c.moe_router in ("topk", "expert_choice")),
    ),
    "moe_hash_table": (
        f"must be one of {', '.join(HASH_TABLES)}",
        lambda c: c.moe_hash_table in HASH_TABLES,
    ),
    "moe_max_experts_per_token": (
        "must be -1 (= 2 x --moe-ffn-split), 0 (no limit) or more",
        lambda c: c.moe_max_experts_per_token >= -1,
    ),
    "moe_combine": (
        f"must be one of {', '.join(COMBINE)}, and only --moe-router threshold and topk take ones",
        lambda c: (
            c.moe_combine in COMBINE and (c.moe_combine == "probs" or c.moe_router in ("threshold", "topk"))
        ),
    ),
    "moe_capacity_factor": (
        "must be 0 (dropless) or more",
        lambda c: 0 <= c.moe_capacity_factor < float("inf"),
    ),
    "moe_eval_capacity_factor": (
        "must be 0 (dropless) or more",
        lambda c: 0 <= c.moe_eval_capacity_factor < float("inf"),
    ),
    "moe_min_capacity": ("must be at least 1", lambda c: c.moe_min_capacity >= 1),
    "moe_expert_parallel_size": (
        "must be -1 (= number of ranks) or at least 1",
        lambda c: c.moe_expert_parallel_size == -1 or c.moe_expert_parallel_size >= 1,
    ),
}


def expert_parallel_size(config: MoEConfig, world_size: int) -> int:
    """N, for a run of `world_size` ranks; 1 for a dense model.

    Raises:
        ValueError: N does not divide the number of ranks or of experts.
    """
    if not config.moe_freq:
        return 1
    size = world_size if config.moe_expert_parallel_size == -1 else config.moe_expert_parallel_size
    for what, number in (
        ("the number of ranks", world_size),
        ("--moe-num-experts", config.moe_num_experts),
    ):
        if number % size:
            raise ValueError(f"--moe-expert-parallel-size must divide {what} {number}, got {size}")
    return size


def _check_router(config: MoEConfig) -> None:
    """What the routers of other methods cannot be combined with."""
    router = config.moe_router
    for name in ("moe_capacity_factor", "moe_eval_capacity_factor"):
        if router in OWN_CAPACITY and getattr(config, name):
            rule = f"must be 0 with --moe-router {router}, which has a capacity of its own"
            raise ValueError(f"{flag(name)} {rule}, got {getattr(config, name)}")
    if router == "gshard" and config.moe_expert_parallel_size != 1:
        rule = "must be 1 with --moe-router gshard (fairscale exchanges equal numbers of tokens only)"
        raise ValueError(f"--moe-expert-parallel-size {rule}, got {config.moe_expert_parallel_size}")
    if router == "gshard" and config.moe_num_experts < 2:
        raise ValueError("--moe-num-experts must be at least 2 with --moe-router gshard, got 1")


def _check_thresholds(config: MoEConfig, sides: tuple[str, ...], model_cfg: Any) -> None:
    """--moe-layer-thresholds: one for each MoE layer."""
    given, name = config.moe_layer_thresholds, "--moe-layer-thresholds"
    if not given:
        return
    layers = sum(
        read_field(model_cfg, f"{side}_layers", 0) // config.moe_freq
        for side in sides
        if config.has_experts(side)
    )
    try:
        fits = len(config.layer_thresholds) == layers and all(0 <= t <= 1 for t in config.layer_thresholds)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must be {layers} numbers in [0, 1], one for each MoE layer, got {given}")


def _check_side(config: MoEConfig, side: str, model_cfg: Any) -> None:
    """Rules between the MoE flags and fairseq's own, for one side that has MoE layers."""

    def own(name: str) -> Any:
        return read_field(model_cfg, name, None)

    num_layers, ffn_dim = own(f"{side}_layers"), own(f"{side}_ffn_embed_dim")
    if ffn_dim % config.moe_ffn_split:
        rule = f"must divide --{side}-ffn-embed-dim {ffn_dim}"
        raise ValueError(f"--moe-ffn-split {rule}, got {config.moe_ffn_split}")
    if config.moe_freq > num_layers:
        rule = f"must be at most --{side}-layers {num_layers} (0 = dense)"
        raise ValueError(f"--moe-freq {rule}, got {config.moe_freq}")
    if config.moe_router == "expert_choice" and side == "decoder":
        raise ValueError(
            "--moe-router expert_choice cannot be used in a decoder: its experts choose among all tokens, so "
            "a token would depend on later ones; add --no-moe-decoder or take another router"
        )
    if config.moe_router in ("topk", "expert_choice") and config.k > config.moe_num_experts:
        rule = f"must be at most --moe-num-experts {config.moe_num_experts}"
        raise ValueError(f"--moe-topk (default: --moe-ffn-split) {rule}, got {config.k}")
    for name in ("scale_fc", "quant_noise_pq", "quant_noise_scalar", "base_layers", f"{side}_layers_to_keep"):
        if own(name):
            raise ValueError(
                f"{flag(name)} cannot be combined with MoE layers (--moe-freq 0 = dense), got {own(name)}"
            )
