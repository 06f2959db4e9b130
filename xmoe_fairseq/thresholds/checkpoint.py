"""Checkpoints of threshold routers: opened to be measured, and written with other thresholds."""

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from omegaconf import DictConfig, OmegaConf
from torch import nn

import xmoe_fairseq.models  # noqa: F401  (registers them)
from xmoe_fairseq.batches import Batches, binarised_folders
from xmoe_fairseq.moe import ThresholdRouter, moe_layers
from xmoe_fairseq.thresholds.measure import Meter, Quality
from xmoe_fairseq.thresholds.report import check_name
from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.files import write_atomically

MAX_TOKENS = 4096  # in a batch, where the checkpoint was trained by --batch-size


def check_paths(checkpoint: Path, output: Path) -> None:
    """Raises UserError: no such checkpoint or folder, or the output is the checkpoint by whatever name."""
    check_is_file(checkpoint)
    check_name("--output", output)
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    if output.exists() and output.samefile(checkpoint):
        raise UserError(
            f"--output {output} is the checkpoint itself, which would be overwritten; name another"
        )


def check_is_file(checkpoint: Path) -> None:
    """Raises UserError."""
    if not checkpoint.is_file():
        problem = "is a folder, no checkpoint" if checkpoint.is_dir() else "no such file"
        raise UserError(f"{checkpoint}: {problem}")


def open_meter(
    checkpoint: Path, data: Path, after: Callable[[Quality], Any], max_tokens: int | None = None
) -> Meter:
    """Of a model on its whole validation set.

    Args:
        max_tokens: in a batch; None = as it was validated.

    Raises:
        UserError: it cannot be opened with this data, or its routers have no threshold.
    """
    model, task, cfg = open_model(checkpoint, data)
    routers = [getattr(layer, "router", None) for layer in moe_layers(model)]
    if not routers or not all(isinstance(router, ThresholdRouter) for router in routers):
        raise UserError(f"CHECKPOINT must be of a model with --moe-router threshold, got {checkpoint}")
    return Meter(model, whole_valid(task, cfg, max_tokens), after)


def open_model(checkpoint: Path, data: Path) -> tuple[nn.Module, Any, DictConfig]:
    """Model, on a GPU if there is one, task and configuration, as fairseq's commands open them.

    Raises:
        UserError: it cannot be opened with this data.
    """
    check_is_file(checkpoint)
    overrides: dict[str, Any] = {"data": binarised_folders(data, "--data")}
    if "eval_bleu" in checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))["cfg"].task:
        overrides["eval_bleu"] = False  # one that was chosen by BLEU would build what translates
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], overrides)
    if torch.cuda.is_available() and not cfg.common.cpu:
        model.cuda()
    return model.eval(), task, cfg


def whole_valid(task: Any, cfg: DictConfig, max_tokens: int | None = None) -> Batches:
    max_tokens = max_tokens or cfg.dataset.max_tokens_valid or MAX_TOKENS
    return Batches(task, "valid", 2**62, max_tokens, seed=1)


def settings_for(thresholds: Sequence[float]) -> dict[str, Any]:
    """What a model's configuration says of its MoE layers' thresholds: fixed ones, and no budget."""
    alike = len(set(thresholds)) == 1
    return {
        "moe_target_experts_per_token": 0.0,
        "moe_threshold": max(thresholds),
        "moe_layer_thresholds": "" if alike else ",".join(map(repr, thresholds)),
    }


def write_checkpoint(checkpoint: Path, output: Path, thresholds: Sequence[float]) -> None:
    """The same model, whose configuration holds the thresholds; without the optimizer's state.

    Raises:
        WriteError: it could not be written.
    """
    state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    state["last_optimizer_state"] = None
    cfg = plain_config(state["cfg"])
    model_cfg = vars(cfg["model"]) if isinstance(cfg["model"], Namespace) else cfg["model"]
    model_cfg |= settings_for(thresholds)
    state["cfg"] = cfg
    state["model"] = {
        name: value for name, value in state["model"].items() if not name.endswith(".router.budget.threshold")
    }
    write_atomically(output, lambda file: torch.save(state, file))


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """As fairseq writes it into a checkpoint; a model of the older kind stays a Namespace."""
    model = cfg.model
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)  # type: ignore[assignment]
    if isinstance(model, Namespace):
        plain["model"] = copy.deepcopy(model)
    return plain
