"""Checkpoints: opened to be measured, and written with other thresholds."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from omegaconf import DictConfig
from torch import Tensor, nn

import xmoe_fairseq.models  # noqa: F401  (registers them)
from xmoe_fairseq.batches import Batches, binarised_folders
from xmoe_fairseq.moe import ThresholdRouter, moe_layers
from xmoe_fairseq.thresholds.measure import Meter
from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.files import write_atomically
from xmoe_fairseq_compat.settings import as_dict

MAX_TOKENS = 4096  # in a batch, where the checkpoint was trained by --batch-size


def check_is_file(checkpoint: Path) -> None:
    """Raises UserError."""
    if not checkpoint.is_file():
        problem = "is a folder, no checkpoint" if checkpoint.is_dir() else "no such file"
        raise UserError(f"{checkpoint}: {problem}")


def open_meter(
    checkpoint: Path, data: Path, max_tokens: int | None = None, valid_tokens: int | None = None
) -> Meter:
    """Of a model on its validation set.

    Args:
        max_tokens: in a batch; None = as it was validated.
        valid_tokens: target tokens that are read, of batches drawn at random; None = all.

    Raises:
        UserError: it cannot be opened with this data, or its routers have no threshold.
    """
    model, task, cfg = open_model(checkpoint, data)
    routers = [getattr(layer, "router", None) for layer in moe_layers(model)]
    if not routers or not all(isinstance(router, ThresholdRouter) for router in routers):
        raise UserError(f"CHECKPOINT must be of a model with --moe-router threshold, got {checkpoint}")
    whole = whole_valid(task, cfg, max_tokens)
    batches = whole if valid_tokens is None else whole.first(valid_tokens)
    return Meter(model, batches, routers[0].rule)  # type: ignore[union-attr]


def open_model(checkpoint: Path, data: Path, **settings: Any) -> tuple[nn.Module, Any, DictConfig]:
    """Model, on a GPU if there is one, task and configuration, as fairseq's commands open them.

    Args:
        settings: of the model, in the place of the checkpoint's.

    Raises:
        UserError: it cannot be opened with this data.
    """
    check_is_file(checkpoint)
    overrides: dict[str, Any] = {"data": binarised_folders(data, "--data"), **settings}
    if "eval_bleu" in checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))["cfg"].task:
        overrides["eval_bleu"] = False  # one that was chosen by BLEU would build what translates
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], overrides)
    if torch.cuda.is_available() and not cfg.common.cpu:
        model.cuda()
    return model.eval(), task, cfg


def whole_valid(task: Any, cfg: DictConfig, max_tokens: int | None = None) -> Batches:
    max_tokens = max_tokens or cfg.dataset.max_tokens_valid or MAX_TOKENS
    return Batches(task, "valid", 2**62, max_tokens, seed=1)


def settings_for(thresholds: Sequence[float], rule: str) -> dict[str, Any]:
    """What a model's configuration says of its MoE layers' thresholds: fixed ones, and no budget."""
    alike = len(set(thresholds)) == 1
    return {
        "moe_target_experts_per_token": 0.0,
        "moe_threshold_rule": rule,
        "moe_threshold": thresholds[0] if alike else None,
        "moe_layer_thresholds": "" if alike else ",".join(map(repr, thresholds)),
    }


def write_checkpoint(
    output: Path, state: dict[str, Any], settings: dict[str, Any], model: dict[str, Tensor]
) -> None:
    """As fairseq's trainer would; without an optimizer's state, an EMA and what was logged, of another model.

    Args:
        state: the checkpoint that it comes from, as fairseq reads it.
        settings: of the model; the others are kept.

    Raises:
        WriteError: it could not be written.
    """
    cfg = as_dict(state["cfg"])
    model_cfg = {**as_dict(cfg["model"]), **settings}
    cfg["model"] = Namespace(**model_cfg) if isinstance(cfg["model"], Namespace) else model_cfg
    extra = {**(state.get("extra_state") or {})}
    for name in ("ema", "metrics"):
        extra.pop(name, None)
    changes = {"args": None, "cfg": cfg, "model": model, "extra_state": extra, "last_optimizer_state": None}
    write_atomically(output, lambda file: torch.save({**state, **changes}, file))
