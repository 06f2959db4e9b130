"""The sparse model: built by the plugin, filled with the parts of the dense one, written as a checkpoint."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from torch import Tensor, nn

from xmoe_fairseq.config import flag, read_field
from xmoe_fairseq.convert.dense import SIDES, SPARSE_NAME, ConvertError, Dense
from xmoe_fairseq.model_config import complete_namespace
from xmoe_fairseq.models import XMoETransformerLanguageModel, XMoETransformerModel
from xmoe_fairseq.models.language_model import XMoETransformerLanguageModelConfig
from xmoe_fairseq.models.translation import XMoETransformerConfig
from xmoe_fairseq.thresholds.checkpoint import plain_config
from xmoe_fairseq_compat.files import write_atomically

MODELS: dict[str, tuple[Any, Any]] = {
    "transformer": (XMoETransformerModel, XMoETransformerConfig),
    "transformer_lm": (XMoETransformerLanguageModel, XMoETransformerLanguageModelConfig),
}


def converted_sides(dense: Dense, no_encoder: bool, no_decoder: bool) -> tuple[str, ...]:
    """Raises ConvertError if none is left."""
    left_out = {"encoder": no_encoder, "decoder": no_decoder}
    sides = tuple(side for side in SIDES[dense.kind] if not left_out[side])
    if not sides:
        raise ConvertError("--no-moe-encoder and --no-moe-decoder leave nothing to convert")
    return sides


def sparse_config(dense: Dense, split: int, sides: tuple[str, ...]) -> Namespace:
    """Raises ConvertError if an FFN cannot be cut so."""
    for side in sides:
        width = read_field(dense.cfg.model, f"{side}_ffn_embed_dim", 0) or getattr(dense.model, side).cfg
        width = width if isinstance(width, int) else getattr(width, side).ffn_embed_dim
        if split < 2 or width % split:
            raise ConvertError(
                f"--split must be 2 or more and divide {flag(side + '_ffn_embed_dim')} {width}, got {split}"
            )
    _, dataclass = MODELS[dense.kind]
    namespace = complete_namespace(dense.cfg.model, dataclass, dense.task)
    name = SPARSE_NAME[dense.kind]
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
        ConvertError: the dense model has something that the plugin refuses.
    """
    try:
        model: nn.Module = MODELS[dense.kind][0].build_model(config, dense.task)
    except ValueError as error:
        raise ConvertError(str(error)) from None
    wanted = model.state_dict()
    values = {name: value for name, value in dense.model.state_dict().items() if name in wanted}
    for layer, parameters in layers.items():
        values |= {f"{layer}.moe.{name}": value for name, value in parameters.items()}
    model.load_state_dict(values)
    return model.eval()


def write_sparse(dense: Dense, model: nn.Module, config: Namespace, path: Path) -> None:
    """As fairseq's trainer would. Raises WriteError."""
    cfg = plain_config(dense.cfg)
    cfg["model"] = config if isinstance(cfg["model"], Namespace) else vars(config)
    cfg["task"]["data"] = dense.state["cfg"]["task"]["data"]
    extra = {key: value for key, value in (dense.state.get("extra_state") or {}).items() if key != "ema"}
    state: dict[str, Any] = {
        **dense.state, "args": None, "cfg": cfg, "model": model.state_dict(), "extra_state": extra,
        "last_optimizer_state": None,
    }  # fmt: skip
    write_atomically(path, lambda file: torch.save(state, file))


def read_sparse(path: Path, task: Any) -> nn.Module:
    """By fairseq's own loader, as the stock commands open it."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)
    return model.eval()
