"""The two models: a dense one, read from a stock checkpoint with the data that it is to be calibrated on, and
the sparse one, built by the plugin and filled with the parts of the dense one."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from torch import Tensor, nn

from xmoe_fairseq.config import MoEConfig, read_field
from xmoe_fairseq.convert.ffn import FeedForward
from xmoe_fairseq.model_config import complete_namespace
from xmoe_fairseq.thresholds.checkpoint import check_is_file, write_checkpoint
from xmoe_fairseq.thresholds.report import Report, write_report
from xmoe_fairseq_compat.components import check_components
from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.misfits import as_flag

SPARSE = "xmoe_"  # how the names of the plugin's models begin
SIDES = {"transformer": ("encoder", "decoder"), "transformer_lm": ("decoder",)}
SPARSITY = "ffn_sparsity_coeff"
TYPED = "flags of fairseq-train"  # in a report
EXACT = 1e-4  # largest difference of log-probabilities from the dense model's, where there should be none
# Their units are near 0 for most inputs, so whole groups of them can be left out.
ACTIVATIONS = ("relu", "relu_squared", "gelu", "gelu_fast", "gelu_accurate")


@dataclass(frozen=True)
class Dense:
    state: dict[str, Any]  # the checkpoint, its `data` replaced
    task: Any
    model: nn.Module  # in evaluation mode
    kind: str  # "transformer" or "transformer_lm"


def read_dense(path: Path, binarised: str | None) -> Dense:
    """With the data and dictionaries of a folder, or of several, joined by colons; None = those it has had.

    Raises:
        UserError: no such file, data or model, or one that cannot be converted.
    """
    check_is_file(path)
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path), {"data": binarised} if binarised else {})
    cfg = state.get("cfg")
    if cfg is None or "model" not in state:
        raise UserError(f"{path} is no fairseq checkpoint: it has no configuration or no model")
    kind = check_model(path, cfg.model, state["model"])
    check_components(path, cfg)
    if read_field(cfg.get("criterion"), SPARSITY, 0.0):
        cfg.criterion[SPARSITY] = 0.0  # a penalty of dense models alone
    if not Path(utils.split_paths(cfg.task.data)[0]).is_dir():
        gone = f"{path} was trained on {cfg.task.data}, which is not there"
        raise FlagError(f"--calibration must be given: {gone}")
    task = tasks.setup_task(cfg.task)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task, state=state)
    for name, parameter in model.named_parameters():  # not the buffers: fairseq leaves one uninitialised
        if not torch.isfinite(parameter).all():
            raise UserError(f"{path} holds NaN or inf in {name}: take an earlier checkpoint")
    return Dense(state, task, model.float().eval(), kind)


def check_model(path: Path, model_cfg: Any, weights: Iterable[str]) -> str:
    """What kind of model it is. Raises UserError."""
    name = read_field(model_cfg, "_name", None) or read_field(model_cfg, "arch", None)
    kind = str(ARCH_MODEL_NAME_REGISTRY.get(name, name)).removeprefix(SPARSE)  # --moe-freq 0 is dense
    if kind in SIDES and any(".moe." in weight for weight in weights):
        raise UserError(f"{path} is sparse already: its model is {name}")
    if kind not in SIDES:
        raise UserError(f"{path} must hold a {' or '.join(SIDES)}, got {name}")
    return kind


def converted_sides(dense: Dense, no_encoder: bool, no_decoder: bool) -> tuple[str, ...]:
    """Raises FlagError if none is left."""
    left_out = {"encoder": no_encoder, "decoder": no_decoder}
    if not (sides := tuple(side for side in SIDES[dense.kind] if not left_out[side])):
        raise FlagError("--no-moe-encoder and --no-moe-decoder leave nothing to convert")
    return sides


def sparse_config(
    dense: Dense, ffns: list[FeedForward], args: Namespace, sides: tuple[str, ...], **settings: Any
) -> Namespace:
    """Of the sparse model.

    Args:
        args: of xmoe-convert.
        settings: of the MoE layers; for others they have their defaults.

    Raises:
        FlagError: an FFN cannot be cut so, or nothing of it be left out.
    """
    activation = read_field(dense.state["cfg"].model, "activation_fn", "relu")
    if not args.upcycle and activation not in ACTIVATIONS:
        rule = f"must be one of {', '.join(ACTIVATIONS)}"
        raise FlagError(f"{args.dense}: --activation-fn {rule}, got {activation}")
    least = 1 if args.upcycle else 2
    for ffn in ffns:
        width = ffn.fc1_bias.numel()
        if args.split < least or width % args.split:
            rule = f"must be {least} or more and divide --{ffn.side}-ffn-embed-dim {width}"
            raise FlagError(f"--split {rule}, got {args.split}")
    name = SPARSE + dense.kind
    namespace = complete_namespace(dense.state["cfg"].model, MODEL_DATACLASS_REGISTRY[name], dense.task)
    changes = {
        "_name": name, "arch": name, "moe_freq": args.moe_freq, "moe_ffn_split": args.split,
        "moe_shared_experts": args.shared, "moe_combine": "ones",
        **{f"no_moe_{side}": side not in sides for side in SIDES[dense.kind]},
    }  # fmt: skip
    defaults = {f.name: f.default for f in fields(MoEConfig)}
    return Namespace(**{**vars(namespace), **defaults, **changes, **settings})


def as_typed(config: Namespace, task: Any) -> str:
    """As flags of fairseq-train, which makes a model of its command line, not of a checkpoint."""
    plain = vars(complete_namespace(Namespace(), MODEL_DATACLASS_REGISTRY[config._name], task))
    parser = ArgumentParser()
    MODEL_REGISTRY[config._name].add_args(parser)  # an architecture also sets what is no flag
    known = {action.dest for action in parser._actions}
    changed = {n: v for n, v in vars(config).items() if n in known and v != plain.get(n, v)}
    words = (as_flag(n, v) for n, v in changed.items() if v is not None and v is not False)
    return " ".join([f"--arch {config.arch}", *words])


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


def compare(dense: Dense, sparse: nn.Module, sample: dict[str, Any]) -> float:
    """The largest difference of log-probabilities. Raises UserError if it is more than rounding: the dense
    model has something that we miss."""
    real = sample["target"].ne(dense.task.target_dictionary.pad())
    with torch.no_grad():
        ours, theirs = (
            model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)[real]  # type: ignore[operator]
            for model in (sparse, dense.model)
        )
    if not (difference := float((ours - theirs).abs().max())) < EXACT:
        raise UserError(f"the outputs differ from those of the dense model, by {difference:.2g}")
    return difference


def write_sparse(args: Namespace, dense: Dense, config: Namespace, model: nn.Module, report: Report) -> None:
    """The checkpoint and, once it could be read, the report."""
    write_checkpoint(args.sparse, dense.state, vars(config), model.state_dict())
    try:
        read_sparse(args.sparse, dense.task)
    except Exception:
        args.sparse.unlink()
        raise
    write_report(args.sparse, report)


def read_sparse(path: Path, task: Any) -> nn.Module:
    """By fairseq's own loader, as the stock commands open it."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)
    return model.eval()
