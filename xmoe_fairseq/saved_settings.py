"""What a checkpoint was, against what the command line makes of it."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from xmoe_fairseq.config import MoEConfig, flag
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.misfits import as_dict, other_sizes, settings_of

logger = logging.getLogger(__name__)

# They change where the experts lie, or how they began, not what a trained model computes.
FREE = ("_name", "moe_expert_parallel_size", "moe_sharded_checkpoints", "moe_router_init_scale")


def check_saved_settings(path: Any, state: Mapping[str, Any], model_cfg: Any) -> None:
    """fairseq builds a model from the command line alone and then fills it with a checkpoint's weights: a
    setting that was left out, such as the t that xmoe-convert has found, would silently be the default.

    Args:
        state: the checkpoint.
        model_cfg: of a model that has MoE layers.

    Raises:
        CheckpointError: it is dense, or a setting differs from this run's and was not typed.
    """
    saved, here = settings_of(state), as_dict(model_cfg)
    if not any(".moe." in name for name in state["model"]):
        raise CheckpointError(
            path, f"it is dense, and this model has experts{other_sizes(saved, here)}; make it sparse with"
            " xmoe-convert first, or leave the experts out with --moe-freq 0"
        )  # fmt: skip
    defaults = {f.name: f.default for f in fields(MoEConfig)}
    here = {**defaults, **here}  # hydra hands over what was typed only
    changed = {name: (saved[name], here[name]) for name in counting(saved) if saved[name] != here[name]}
    passed_over = {name for name, (_, now) in changed.items() if now == defaults[name] and not typed(name)}
    if passed_over:
        keep = " ".join(as_flag(name, changed[name][0]) for name in sorted(passed_over))
        change = " ".join(as_flag(name, changed[name][1]) for name in sorted(passed_over))
        raise CheckpointError(
            path, f"it was trained or converted with other settings than this run's; add {keep} to keep"
            f" them, or {change} to change them"
        )  # fmt: skip
    for name, (was, now) in changed.items():
        logger.warning(f"{path} was saved with {as_flag(name, was)}; from here on: {as_flag(name, now)}")


def counting(saved: Mapping[str, Any]) -> list[str]:
    """Names of the MoE settings in a checkpoint that say what the model is."""
    names = [f.name for f in fields(MoEConfig) if f.name in saved and f.name not in FREE]
    steered = saved.get("moe_target_experts_per_token") or saved.get("moe_layer_thresholds")
    if steered or saved.get("moe_router") != "threshold":
        names = [name for name in names if name != "moe_threshold"]
    return names


def typed(name: str) -> bool:
    """Whether the command line has this setting, for fairseq-train or for hydra."""
    given = {word.split("=")[0].lstrip("+") for word in sys.argv}
    return flag(name) in given or f"model.{name}" in given


def as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name) if value else f"no {flag(name)}"
    return f"{flag(name)} {value if value != '' else repr('')}"
