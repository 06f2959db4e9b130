"""A penalty on the ReLU activations of a dense model's FFNs: where few neurons matter for a token,
`xmoe-convert` leaves out more of them at the same loss. Szatkowski et al. 2024 (D2DMoE), section 3.1,
arXiv 2310.04361."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fairseq import metrics
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn

from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.moe.losses import mean_magnitude, square_hoyer
from xmoe_fairseq_compat.errors import FlagError

PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"hoyer": square_hoyer, "l1": mean_magnitude}
FLAG = "--ffn-sparsity-coeff"


class Activations(NamedTuple):
    """Of one call of an FFN."""

    penalty: Tensor  # (), mean over tokens that are no padding; differentiable
    active: Tensor  # neurons above 0, summed over these tokens
    neurons: Tensor  # all of them


@contextmanager
def watch(kind: str, model: nn.Module, net_input: dict[str, Any], pad: int) -> Iterator[list[Activations]]:
    """Collects those of each FFN that runs in the block.

    Args:
        kind: of `PENALTIES`.
        net_input: what the model is called with.

    Raises:
        FlagError: the model has no such FFN, another activation, or experts; or a penalty has no gradient.
    """
    calls: list[Activations] = []
    source = net_input["src_tokens"]
    ids = {"encoder": source, "decoder": net_input.get("prev_output_tokens", source)}
    real = {side: of.ne(pad).t() for side, of in ids.items()}  # (length, batch), as layers have it

    def keep(side: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        hidden, tokens = inputs[0], real[side].sum()
        values = PENALTIES[kind](hidden)
        penalty = torch.where(real[side], values, 0.0).sum() / tokens.clamp(min=1)
        active = (hidden.detach() > 0).sum(dim=-1).mul(real[side]).sum()
        calls.append(Activations(penalty, active, tokens * hidden.size(-1)))

    # What goes into the dropout behind an activation is what it gives.
    handles = [
        layer.activation_dropout_module.register_forward_pre_hook(partial(keep, side))
        for side, layer in penalised_layers(model)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    if torch.is_grad_enabled() and not all(call.penalty.requires_grad for call in calls):
        raise FlagError(f"{FLAG} cannot be combined with --checkpoint-activations or a frozen model")


def penalised_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """By their sides. Raises FlagError."""
    if experts := moe_layers(model):
        raise FlagError(f"{FLAG} needs a dense model (--moe-freq 0), got {len(experts)} MoE layers")
    kinds = {TransformerEncoderLayerBase: "encoder", TransformerDecoderLayerBase: "decoder"}
    found = [(side, module) for module in model.modules() for kind, side in kinds.items()
             if isinstance(module, kind)]  # fmt: skip
    if not found:
        raise FlagError(f"{FLAG} needs a model of fairseq's Transformer layers, got {type(model).__name__}")
    for _, layer in found:
        if layer.activation_fn is not F.relu:
            got = getattr(layer.activation_fn, "__name__", layer.activation_fn)
            raise FlagError(f"{FLAG} needs --activation-fn relu, got {got}")
    return found


def mean_penalty(calls: list[Activations], device: torch.device) -> Tensor:
    """Of the FFNs that ran; 0 of none, as LayerDrop may leave."""
    zero = torch.zeros((), device=device)
    return torch.stack([call.penalty for call in calls]).mean() if calls else zero


def sums_of(calls: list[Activations], penalty: Tensor, sample_size: Any) -> dict[str, Tensor]:
    """Logging outputs, which add up over batches and ranks."""
    zero = torch.zeros((), dtype=torch.float64, device=penalty.device)
    return {
        "ffn_penalty": penalty.detach() * sample_size,
        "ffn_active": sum((call.active for call in calls), zero),
        "ffn_neurons": sum((call.neurons for call in calls), zero),
    }


def log_sparsity(logging_outputs: list[dict[str, Any]]) -> None:
    """The penalty, without its coefficient, and the share of neurons that are active."""
    for name, of in (("ffn_active", "ffn_neurons"), ("ffn_penalty", "sample_size")):
        if total := sum(log.get(of, 0) for log in logging_outputs if name in log):
            value = sum(log[name] for log in logging_outputs if name in log) / total
            metrics.log_scalar(name, value, total, round=4)
