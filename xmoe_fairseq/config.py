"""Reads a model's --moe-* flags (flags.py) and checks what they must satisfy."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from xmoe_fairseq.flags import (
    COMBINE,
    HASH_TABLES,
    OWN_CAPACITY,
    ROUTERS,
    WITHOUT_SCORES,
    MoEConfig,
    flag,
    read_field,
)
from xmoe_fairseq_compat.errors import FlagError

__all__ = ["MoEConfig", "expert_parallel_size", "flag", "read_field", "read_moe_config"]


def read_moe_config(model_cfg: Any, sides: tuple[str, ...]) -> MoEConfig:
    """The checked MoE fields of a model's complete configuration (DictConfig or Namespace).

    fairseq hands `build_model` whatever the command line, hydra, a checkpoint or --model-overrides left
    there, so this is the one place that all of them pass.

    Args:
        sides: "encoder", "decoder" or both: what the model has.

    Raises:
        FlagError: a value that breaks a rule; names the flag, the rule and the value.
    """
    defaults = {f.name: f.default for f in fields(MoEConfig) if f.name != "_name"}
    values = {name: read_field(model_cfg, name, default) for name, default in defaults.items()}
    config = MoEConfig(**values)
    for name, default in defaults.items():
        _check_type(name, values[name], default)
    for name, (rule, holds) in _RULES.items():
        if not holds(config):
            raise FlagError(f"{flag(name)} {rule}, got {getattr(config, name)}")
    _check_router(config)
    _check_thresholds(config, sides, model_cfg)
    for side in sides:
        if config.has_experts(side):
            _check_side(config, side, model_cfg)
    return config


def _check_type(name: str, value: Any, default: Any) -> None:
    kind = type(default)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise FlagError(f"{flag(name)} must be of type {kind.__name__}, got {value!r}")


_RULES: dict[str, tuple[str, Callable[[MoEConfig], bool]]] = {
    "moe_freq": ("must be 0 (dense) or more", lambda c: c.moe_freq >= 0),
    "moe_router": (f"must be one of {', '.join(ROUTERS)}", lambda c: c.moe_router in ROUTERS),
    "moe_num_experts": ("must be in [1, 2^20]", lambda c: 1 <= c.moe_num_experts <= 2**20),
    "moe_ffn_split": ("must be at least 1", lambda c: c.moe_ffn_split >= 1),
    "moe_threshold": ("must be in [0, 1]", lambda c: 0 <= c.moe_threshold <= 1),
    "moe_target_experts_per_token": (
        "must be 0 (off), or from 1 to --moe-max-experts-per-token (default: 2s) and --moe-num-experts",
        lambda c: (
            c.moe_target_experts_per_token == 0
            or 1 <= c.moe_target_experts_per_token <= c.most_experts_per_token
        ),
    ),
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
    # Beyond these, scores overflow or are all the same.
    "moe_router_temperature": ("must be from 1e-6 to 1e6", lambda c: 1e-6 <= c.moe_router_temperature <= 1e6),
    "moe_router_init_scale": ("must be from 1e-6 to 1e6", lambda c: 1e-6 <= c.moe_router_init_scale <= 1e6),
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
            raise FlagError(f"--moe-expert-parallel-size must divide {what} {number}, got {size}")
    return size


def _check_router(config: MoEConfig) -> None:
    """What the routers of other methods cannot be combined with."""
    router = config.moe_router
    for name in ("moe_capacity_factor", "moe_eval_capacity_factor"):
        if router in OWN_CAPACITY and getattr(config, name):
            rule = f"must be 0 with --moe-router {router}, which has a capacity of its own"
            raise FlagError(f"{flag(name)} {rule}, got {getattr(config, name)}")
    if router == "gshard" and config.moe_expert_parallel_size != 1:
        rule = "must be 1 with --moe-router gshard (fairscale exchanges equal numbers of tokens only)"
        raise FlagError(f"--moe-expert-parallel-size {rule}, got {config.moe_expert_parallel_size}")
    for name in ("moe_router_temperature", "moe_router_init_scale"):
        if router in WITHOUT_SCORES and getattr(config, name) != 1:
            rule = f"must be 1 with --moe-router {router}, whose scores are not the plugin's"
            raise FlagError(f"{flag(name)} {rule}, got {getattr(config, name)}")
    for name in ("moe_target_experts_per_token", "moe_layer_thresholds"):
        if router != "threshold" and getattr(config, name):
            raise FlagError(f"{flag(name)} needs --moe-router threshold, got {router}")
    if router == "gshard" and config.moe_num_experts < 2:
        raise FlagError("--moe-num-experts must be at least 2 with --moe-router gshard, got 1")


def _check_thresholds(config: MoEConfig, sides: tuple[str, ...], model_cfg: Any) -> None:
    """--moe-layer-thresholds: one for each MoE layer."""
    given, name = config.moe_layer_thresholds, "--moe-layer-thresholds"
    if not given:
        return
    if config.moe_target_experts_per_token:
        raise FlagError(f"{name} cannot be combined with --moe-target-experts-per-token, got {given}")
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
        raise FlagError(f"{name} must give each of the {layers} MoE layers a number in [0, 1], got {given}")


def _check_side(config: MoEConfig, side: str, model_cfg: Any) -> None:
    """Rules between the MoE flags and fairseq's own, for one side that has MoE layers."""

    def own(name: str) -> Any:
        return read_field(model_cfg, name, None)

    num_layers, ffn_dim = own(f"{side}_layers"), own(f"{side}_ffn_embed_dim")
    if ffn_dim % config.moe_ffn_split:
        rule = f"must divide --{side}-ffn-embed-dim {ffn_dim}"
        raise FlagError(f"--moe-ffn-split {rule}, got {config.moe_ffn_split}")
    if config.moe_freq > num_layers:
        rule = f"must be at most --{side}-layers {num_layers} (0 = dense)"
        raise FlagError(f"--moe-freq {rule}, got {config.moe_freq}")
    if config.moe_router == "expert_choice" and side == "decoder":
        raise FlagError(
            "--moe-router expert_choice cannot be used in a decoder: its experts choose among all tokens, so "
            "a token would depend on later ones; add --no-moe-decoder or take another router"
        )
    if config.moe_router in ("topk", "expert_choice") and config.k > config.moe_num_experts:
        rule = f"must be at most --moe-num-experts {config.moe_num_experts}"
        raise FlagError(f"--moe-topk (default: --moe-ffn-split) {rule}, got {config.k}")
    for name in ("scale_fc", "quant_noise_pq", "quant_noise_scalar", "base_layers", f"{side}_layers_to_keep"):
        if own(name):
            raise FlagError(
                f"{flag(name)} cannot be combined with MoE layers (--moe-freq 0 = dense), got {own(name)}"
            )
