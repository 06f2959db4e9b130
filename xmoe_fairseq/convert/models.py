"""The two models: a dense one, read from a stock checkpoint with the data that it is to be calibrated on, and
the sparse one, built by the plugin and filled with the parts of the dense one."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from torch import Tensor, nn

from xmoe_fairseq.config import read_field
from xmoe_fairseq.convert.ffn import FeedForward
from xmoe_fairseq.model_config import complete_namespace
from xmoe_fairseq.thresholds.checkpoint import check_is_file
from xmoe_fairseq_compat.components import check_components
from xmoe_fairseq_compat.errors import FlagError, UserError

SPARSE = "xmoe_"  # how the names of the plugin's models begin
SIDES = {"transformer": ("encoder", "decoder"), "transformer_lm": ("decoder",)}
# Their units are near 0 for most inputs, so whole groups of them can be left out.
ACTIVATIONS = ("relu", "relu_squared", "gelu", "gelu_fast", "gelu_accurate")


@dataclass(frozen=True)
class Dense:
    state: dict[str, Any]  # the checkpoint, its `data` replaced
    task: Any
    model: nn.Module  # in evaluation mode
    kind: str  # "transformer" or "transformer_lm"


def read_dense(path: Path, binarised: str) -> Dense:
    """With the data and dictionaries of a folder, or of several, joined by colons.

    Raises:
        UserError: no such file or model, or one that cannot be converted.
    """
    check_is_file(path)
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path), {"data": binarised})
    cfg = state.get("cfg")
    if cfg is None or "model" not in state:
        raise UserError(f"{path} is no fairseq checkpoint: it has no configuration or no model")
    kind = check_model(path, cfg.model)
    check_components(path, cfg)
    task = tasks.setup_task(cfg.task)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task, state=state)
    for name, parameter in model.named_parameters():  # not the buffers: fairseq leaves one uninitialised
        if not torch.isfinite(parameter).all():
            raise UserError(f"{path} holds NaN or inf in {name}: take an earlier checkpoint")
    return Dense(state, task, model.float().eval(), kind)


def check_model(path: Path, model_cfg: Any) -> str:
    """What kind of model it is. Raises UserError."""
    name = read_field(model_cfg, "_name", None) or read_field(model_cfg, "arch", None)
    kind = ARCH_MODEL_NAME_REGISTRY.get(name, name)
    if kind in [SPARSE + each for each in SIDES]:
        raise UserError(f"{path} is sparse already: its model is {name}")
    if kind not in SIDES:
        raise UserError(f"{path} must hold a {' or '.join(SIDES)}, got {name}")
    activation = read_field(model_cfg, "activation_fn", "relu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: --activation-fn must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    return str(kind)


def converted_sides(dense: Dense, no_encoder: bool, no_decoder: bool) -> tuple[str, ...]:
    """Raises FlagError if none is left."""
    left_out = {"encoder": no_encoder, "decoder": no_decoder}
    if not (sides := tuple(side for side in SIDES[dense.kind] if not left_out[side])):
        raise FlagError("--no-moe-encoder and --no-moe-decoder leave nothing to convert")
    return sides


def sparse_config(dense: Dense, ffns: list[FeedForward], split: int, sides: tuple[str, ...]) -> Namespace:
    """Raises FlagError if an FFN cannot be cut so."""
    for ffn in ffns:
        width = ffn.fc1_bias.numel()
        if split < 2 or width % split:
            rule = f"must be 2 or more and divide --{ffn.side}-ffn-embed-dim {width}"
            raise FlagError(f"--split {rule}, got {split}")
    name = SPARSE + dense.kind
    namespace = complete_namespace(dense.state["cfg"].model, MODEL_DATACLASS_REGISTRY[name], dense.task)
    changes = {
        "_name": name, "arch": name, "moe_freq": 1, "moe_router": "threshold", "moe_threshold": 1.0,
        "moe_num_experts": split, "moe_ffn_split": split, "moe_max_experts_per_token": 0,
        "moe_combine": "ones", "no_moe_encoder": "encoder" not in sides,
        "no_moe_decoder": "decoder" not in sides,
    }  # fmt: skip
    return Namespace(**{**vars(namespace), **changes})


def build_sparse(dense: Dense, config: Namespace, layers: dict[str, dict[str, Tensor]]) -> nn.Module:
    """The sparse model, in evaluation mode.

    Args:
        layers: the parameters of each MoE layer, by the layer's name.

    Raises:
        FlagError: the dense model has something that the plugin refuses.
    """
    try:
        model: nn.Module = MODEL_REGISTRY[SPARSE + dense.kind].build_model(config, dense.task)
    except ValueError as error:
        raise FlagError(str(error)) from None
    wanted = model.state_dict()
    values = {name: value for name, value in dense.model.state_dict().items() if name in wanted}
    for layer, parameters in layers.items():
        values |= {f"{layer}.moe.{name}": value for name, value in parameters.items()}
    model.load_state_dict(values)
    return model.eval()


def read_sparse(path: Path, task: Any) -> nn.Module:
    """By fairseq's own loader, as the stock commands open it."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)
    return model.eval()
