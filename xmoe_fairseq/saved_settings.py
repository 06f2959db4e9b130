"""What a checkpoint was, against what the command line makes of it."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from xmoe_fairseq.config import MoEConfig
from xmoe_fairseq.moe.routers.registry import RouterKind, flags_of_routers, registered_routers
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.misfits import as_flag, check_left_out, other_sizes, settings_of
from xmoe_fairseq_compat.settings import as_dict

# They change where the experts lie, what computes them, or how they began, not what a trained model computes.
FREE = ("_name", "moe_expert_parallel_size", "moe_kernel", "moe_router_init_scale", "moe_sharded_checkpoints")


def check_saved_settings(path: Any, state: Mapping[str, Any], model_cfg: Any) -> None:
    """Settings such as the t that xmoe-convert has found lie in a checkpoint's configuration, not in weights.

    Args:
        state: the checkpoint.
        model_cfg: of a model that has MoE layers.

    Raises:
        CheckpointError: it is dense; or this run has the default of a setting that was another, and was not
            asked to.
    """
    saved, defaults = settings_of(state), {f.name: f.default for f in fields(MoEConfig)}
    here = {**defaults, **as_dict(model_cfg)}  # hydra hands over what was typed only
    if not any(".moe." in name for name in state["model"]):
        raise CheckpointError(
            path,
            f"it is dense, and this model has experts{other_sizes(saved, here)}; make it sparse first, by"
            f" {upcycling(path, here)}, or leave the experts out with --moe-freq 0",
        )
    changed = {name: (saved[name], here[name]) for name in counting(saved) if saved[name] != here[name]}
    if here["moe_router"] not in (saved.get("moe_router"), defaults["moe_router"]):  # asked to be another
        changed.pop("moe_router_args", None)
    check_left_out(path, {name: both for name, both in changed.items() if both[1] == defaults[name]})


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
