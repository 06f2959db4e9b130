"""Reads a model's --moe-* flags (flags.py) and checks what they must satisfy."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from xmoe_fairseq.flags import MoEConfig, read_field, takers_of, takes_weights
from xmoe_fairseq.moe.experts.kernels import kernel_names
from xmoe_fairseq.moe.layer import COMBINE
from xmoe_fairseq.moe.routed_layer import RoutedLayer
from xmoe_fairseq.moe.routers.base import Router
from xmoe_fairseq.moe.routers.cheap_flags import num_cheap
from xmoe_fairseq.moe.routers.registry import RouterKind, flags_of_routers, router_named
from xmoe_fairseq.router_args import read_router_args
from xmoe_fairseq_compat.errors import FlagError, flag

__all__ = ["MoEConfig", "expert_parallel_size", "flag", "read_field", "read_moe_config", "router_kind"]


def read_moe_config(model_cfg: Any, sides: tuple[str, ...]) -> MoEConfig:
    """The checked and settled MoE fields of a model's complete configuration (DictConfig or Namespace).

    fairseq hands `build_model` whatever the command line, hydra, a checkpoint or --model-overrides left
    there, so this is the one place that all of them pass.

    Args:
        sides: "encoder", "decoder" or both: what the model has.

    Raises:
        FlagError: a value that breaks a rule; names the flag, the rule and the value.
    """
    defaults = {f.name: f.default for f in fields(MoEConfig) if f.name != "_name"}
    values = {name: read_field(model_cfg, name, default) for name, default in defaults.items()}
    for name, value in values.items():
        _check_type(name, value, defaults[name])
    for name, (rule, holds) in _RULES.items():
        if not holds(values[name]):
            raise FlagError(f"{flag(name)} {rule}, got {values[name]}")
    config = MoEConfig(**values)
    if config.moe_kernel not in kernel_names():  # not in _RULES: a --user-dir may have registered one since
        raise FlagError(f"--moe-kernel must be one of {', '.join(kernel_names())}, got {config.moe_kernel}")
    kind = router_kind(config.moe_router)
    _check_router(config, kind)
    config = replace(config, **kind.settle(config))
    with_experts = [side for side in sides if config.has_experts(side)]
    for side in with_experts:
        _check_side(config, kind, side, model_cfg)
    num_layers = sum(read_field(model_cfg, f"{side}_layers", 0) // config.moe_freq for side in with_experts)
    try:
        kind.check(config, num_layers)
    except ValueError as error:
        raise FlagError(str(error)) from None
    return config


def router_kind(name: str) -> type[RouterKind]:
    """Raises FlagError if no router is registered by that name."""
    try:
        return router_named(name)
    except ValueError as error:
        raise FlagError(str(error)) from None


def _check_type(name: str, value: Any, default: Any) -> None:
    if name == "moe_router_args" or value is default is None:  # read_router_args says more
        return
    kind = float if default is None else type(default)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise FlagError(f"{flag(name)} must be of type {kind.__name__}, got {value!r}")


Rule = tuple[str, Callable[[Any], bool]]
_AT_LEAST_1: Rule = ("must be at least 1", lambda n: n >= 1)
_SCALE: Rule = ("must be from 1e-6 to 1e6", lambda x: 1e-6 <= x <= 1e6)  # else scores overflow, or are one
_CAPACITY: Rule = ("must be 0 (dropless) or more", lambda x: 0 <= x < float("inf"))
_RULES: dict[str, Rule] = {
    "moe_freq": ("must be 0 (dense) or more", lambda n: n >= 0),
    "moe_num_experts": ("must be in [1, 2^20]", lambda n: 1 <= n <= 2**20),
    "moe_ffn_split": _AT_LEAST_1,
    "moe_shared_experts": ("must be 0 (none) or more", lambda n: n >= 0),
    "moe_router_hidden_dim": ("must be 0 (none) or more", lambda n: n >= 0),
    "moe_router_temperature": _SCALE,
    "moe_router_init_scale": _SCALE,
    "moe_output_scale": _SCALE,
    "moe_capacity_factor": _CAPACITY,
    "moe_eval_capacity_factor": _CAPACITY,
    "moe_min_capacity": _AT_LEAST_1,
    "moe_expert_parallel_size": ("must be -1 (= number of ranks) or at least 1", lambda n: n == -1 or n >= 1),
}


def expert_parallel_size(config: MoEConfig, world_size: int) -> int:
    """N, for a run of `world_size` ranks; 1 for a dense model.

    Raises:
        ValueError: N does not divide the number of ranks or of experts.
    """
    if not config.moe_freq:
        return 1
    size = world_size if config.moe_expert_parallel_size == -1 else config.moe_expert_parallel_size
    for what, number in (("the number of ranks", world_size), ("--moe-num-experts", config.moe_num_experts)):
        if number % size:
            raise FlagError(f"--moe-expert-parallel-size must divide {what} {number}, got {size}")
    return size


def _check_router(config: MoEConfig, kind: type[RouterKind]) -> None:
    """What goes with which router, as the routers declare it."""

    def refuse(name: str, rule: str) -> None:
        raise FlagError(f"{flag(name)} {rule}, got {getattr(config, name)}")

    here = f"with --moe-router {config.moe_router}"
    for f, takers in flags_of_routers().items():
        if not f.holds(config):
            refuse(f.name, f.rule)
        is_asked = getattr(config, f.name) not in (f.default, *f.idle)
        if f.refused_elsewhere and f not in kind.flags and is_asked:
            takes = " or ".join(takers)
            raise FlagError(f"{flag(f.name)} needs --moe-router {takes}, got {config.moe_router}")
    combine = config.moe_combine
    if combine not in COMBINE:
        refuse("moe_combine", f"must be one of {', '.join(COMBINE)}")
    if not takes_weights(kind, combine):
        refuse("moe_combine", f"must be probs {here}: only {takers_of(combine)} take {combine}")
    if combine != "probs" and num_cheap(config):
        refuse("moe_combine", "must be probs with zero, copy or constant experts")
    for name in ("moe_capacity_factor", "moe_eval_capacity_factor"):
        if kind.has_own_capacity and getattr(config, name):
            refuse(name, f"must be 0 {here}, which has a capacity of its own")
    if issubclass(kind, RoutedLayer) and config.moe_shared_experts:
        refuse("moe_shared_experts", f"must be 0 {here}, which is a layer of its own")
    for name in ("moe_router_temperature", "moe_router_init_scale"):
        if not issubclass(kind, Router) and getattr(config, name) != 1:
            refuse(name, f"must be 1 {here}, whose scores are not the plugin's")
    if config.moe_router_hidden_dim and getattr(kind, "score", None) is not Router.score:
        refuse("moe_router_hidden_dim", f"must be 0 {here}, whose scores are its own")
    read_router_args(config.moe_router, kind, config.moe_router_args)


def _check_side(config: MoEConfig, kind: type[RouterKind], side: str, model_cfg: Any) -> None:
    """Rules between the MoE flags and fairseq's own, for one side that has MoE layers."""

    def own(name: str) -> Any:
        return read_field(model_cfg, name, None)

    split, ffn_dim = config.moe_ffn_split, own(f"{side}_ffn_embed_dim")
    if ffn_dim % split:
        raise FlagError(f"--moe-ffn-split must divide --{side}-ffn-embed-dim {ffn_dim}, got {split}")
    freq, most = config.moe_freq, own(f"{side}_layers")
    if freq > most:
        raise FlagError(f"--moe-freq must be at most --{side}-layers {most} (0 = dense), got {freq}")
    if side == "decoder" and not kind.is_causal:
        raise FlagError(
            f"--moe-router {config.moe_router} cannot be used in a decoder: it chooses among all tokens "
            "of a batch or sentence, so one would depend on later ones; add --no-moe-decoder or take another "
            "router"
        )
    for name in ("scale_fc", "quant_noise_pq", "quant_noise_scalar", "base_layers", f"{side}_layers_to_keep"):
        if own(name):
            rule = "cannot be combined with MoE layers (--moe-freq 0 = dense)"
            raise FlagError(f"{flag(name)} {rule}, got {own(name)}")
