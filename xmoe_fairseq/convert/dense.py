"""A stock fairseq checkpoint: read, checked, and built with the data that it is to be calibrated on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_NAME_REGISTRY
from omegaconf import DictConfig
from torch import nn

from xmoe_fairseq.config import read_field
from xmoe_fairseq.thresholds.checkpoint import check_is_file
from xmoe_fairseq_compat.components import check_components

SPARSE_NAME = {"transformer": "xmoe_transformer", "transformer_lm": "xmoe_transformer_lm"}
SIDES = {"transformer": ("encoder", "decoder"), "transformer_lm": ("decoder",)}
# Their units are near 0 for most inputs, so whole groups of them can be left out.
ACTIVATIONS = ("relu", "relu_squared", "gelu", "gelu_fast", "gelu_accurate")


class ConvertError(ValueError):
    """What was given cannot be converted; one line for the user."""


@dataclass(frozen=True)
class Dense:
    state: dict[str, Any]  # the checkpoint
    cfg: DictConfig  # its configuration, with `data` replaced
    task: Any
    model: nn.Module  # in evaluation mode
    kind: str  # "transformer" or "transformer_lm"


def read_dense(path: Path, binarised: str) -> Dense:
    """
    Args:
        binarised: folder (or several, joined by colons) of the calibration data and its dictionaries.

    Raises:
        UserError: no such file.
        ConvertError: no such model, or one that cannot be converted.
    """
    check_is_file(path)
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path), {"data": binarised})
    cfg = state.get("cfg")
    if state.get("args") is not None:
        cfg = convert_namespace_to_omegaconf(state["args"])
    if cfg is None or "model" not in state:
        raise ConvertError(f"{path} is no fairseq checkpoint: it has no configuration or no model")
    kind = check_model(path, cfg.model)
    check_components(path, cfg)
    task = tasks.setup_task(cfg.task)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task, state=state)
    for name, parameter in model.named_parameters():  # not the buffers: fairseq leaves one uninitialised
        if not torch.isfinite(parameter).all():
            raise ConvertError(f"{path} holds NaN or inf in {name}: take an earlier checkpoint")
    return Dense(state, cfg, task, model.float().eval(), kind)


def check_model(path: Path, model_cfg: Any) -> str:
    """What kind of model it is. Raises ConvertError."""
    name = read_field(model_cfg, "_name", None) or read_field(model_cfg, "arch", None)
    kind = ARCH_MODEL_NAME_REGISTRY.get(name, name)
    if kind in SPARSE_NAME.values():
        raise ConvertError(f"{path} is sparse already: its model is {name}")
    if kind not in SPARSE_NAME:
        raise ConvertError(f"{path} must hold a {' or '.join(SPARSE_NAME)}, got {name}")
    activation = read_field(model_cfg, "activation_fn", "relu")
    if activation not in ACTIVATIONS:
        raise ConvertError(
            f"{path}: --activation-fn must be one of {', '.join(ACTIVATIONS)}, got {activation}"
        )
    return str(kind)
