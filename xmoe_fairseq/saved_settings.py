"""What a checkpoint was, against what the command line makes of it."""

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf, open_dict

from xmoe_fairseq.config import MoEConfig, router_kind
from xmoe_fairseq.flags import settled_config
from xmoe_fairseq.moe.routers.registry import RouterKind, flags_of_routers, registered_routers
from xmoe_fairseq.moe.routers.threshold_flags import DEFAULT_BUDGET
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.misfits import as_flag, check_left_out, other_sizes, settings_of
from xmoe_fairseq_compat.settings import as_dict

# They change where the experts lie, what computes them, or how they began, not what a trained model computes.
FREE = ("_name", "moe_expert_parallel_size", "moe_kernel", "moe_router_init_scale", "moe_sharded_checkpoints")
# What was added since, as it was before; t was 0.9 unless given, also where something stood in its place.
OLD = {"moe_threshold_rule": "mass", "moe_target_experts_per_token": 0.0}


def settle(model_cfg: Any) -> str:
    """Write into a model's configuration what its router makes of flags that leave a choice to it: so a
    checkpoint says what it is, whatever the defaults will be. Returns the same for the log."""
    given, config = dict(as_dict(model_cfg)), settled_config(model_cfg)
    settled = router_kind(config.moe_router).settle(config)
    with open_dict(model_cfg) if OmegaConf.is_config(model_cfg) else nullcontext():
        for name, value in settled.items():
            setattr(model_cfg, name, value)
    made = " ".join(as_flag(n, v) for n, v in settled.items() if v and v != given.get(n))
    return f"; by default {made}" if made else ""


def brought_up(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's settings were in an earlier version, where it did not say so."""
    if saved.get("moe_threshold") is None:
        return {}
    budget, each = saved.get("moe_target_experts_per_token", 0), saved.get("moe_layer_thresholds")
    idle = {"moe_threshold": None} if each or budget not in (0, DEFAULT_BUDGET) else {}
    return {name: value for name, value in OLD.items() if name not in saved} | idle


def check_saved_settings(path: Any, state: Mapping[str, Any], model_cfg: Any) -> None:
    """Settings such as the t that xmoe-convert has found lie in a checkpoint's configuration, not in weights.

    Args:
        state: the checkpoint.
        model_cfg: of a model that has MoE layers, as it was given.

    Raises:
        CheckpointError: it is dense; or this run has the default of a setting that was another, and was not
            asked to.
    """
    saved, defaults = settings_of(state), {f.name: f.default for f in fields(MoEConfig)}
    saved = {**saved, **brought_up(saved)}
    given = {**defaults, **as_dict(model_cfg)}  # hydra hands over what was typed only
    here = {**given, **vars(settled_config(given))}
    if not any(".moe." in name for name in state["model"]):
        raise CheckpointError(
            path,
            f"it is dense, and this model has experts{other_sizes(saved, here)}; make it sparse first, by"
            f" {upcycling(path, here)}, or leave the experts out with --moe-freq 0",
        )
    changed = {name: saved[name] for name in counting(saved) if saved[name] != here[name]}
    if here["moe_router"] not in (saved.get("moe_router"), defaults["moe_router"]):  # asked to be another
        idle = {f.name for f in flags_of_routers() if f not in router_kind(here["moe_router"]).flags}
        changed = {name: was for name, was in changed.items() if name not in {"moe_router_args", *idle}}
    asked = {name for name in defaults if given[name] != defaults[name]}
    asked |= {f.name for f in flags_of_routers() if asked & {*f.unless}}
    stands = {f.name: other for f in flags_of_routers() for other in f.unless if here[other]}
    left_out = {
        name: (was, here[stands.get(name, name)]) for name, was in changed.items() if name not in asked
    }
    check_left_out(path, left_out, stands)


def upcycling(path: Any, here: Mapping[str, Any]) -> str:
    """The command that makes a model of this one's experts out of a dense checkpoint."""
    parts, (copies, rest) = here["moe_ffn_split"], divmod(here["moe_num_experts"], here["moe_ffn_split"])
    sizes = f"--upcycle {'N' if rest else copies} --split {parts}"
    further = [as_flag("moe_freq", here["moe_freq"])] if here["moe_freq"] != 1 else []
    further += [as_flag(name) for name in ("no_moe_encoder", "no_moe_decoder") if here[name]]
    return " ".join(["xmoe-convert", shlex.quote(str(path)), "moe.pt", sizes, *further])


def counting(saved: Mapping[str, Any]) -> list[str]:
    """Names of the MoE settings in a checkpoint that say what the model is."""
    taken = registered_routers().get(saved.get("moe_router", ""), RouterKind).flags
    idle = [f.name for f in flags_of_routers() if f not in taken or any(map(saved.get, f.unless))]
    return [f.name for f in fields(MoEConfig) if f.name in saved and f.name not in (*FREE, *idle)]
