"""The native kernel for CPUs: C++ operators `torch.ops.xmoe.*`, compiled by build.py, loaded at first use."""

import logging
from functools import cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from xmoe_fairseq.moe.native.build import COMMAND, HERE, is_whole, library_name

logger = logging.getLogger(__name__)


@cache
def missing() -> str:
    """ "" if the operators are there, else why not; then the log says once what to do."""
    path = HERE / library_name()
    reason = ""
    try:
        if not path.exists():
            reason = "it has not been compiled for this torch"
        elif not is_whole(path):
            reason = f"{path} is damaged"
        else:
            torch.ops.load_library(str(path))
    except OSError as error:  # from torch, or the file may not be read
        reason = str(error)
    if reason:
        logger.warning(f"no native kernel, experts take longer on the CPU: {reason}; run: {COMMAND}")
        return reason
    torch.library.register_fake("xmoe::expert_sums", _expert_sums_shapes)
    torch.library.register_fake("xmoe::expert_gradients", _expert_gradients_shapes)
    return ""


def is_differentiated(*inputs: Tensor | None) -> bool:
    """Whether autograd has to see a call. Operators have no derivative, forward mode would silently find 0;
    an autograd.Function takes longer than they do for one token, and refuses forward mode."""
    given = [tensor for tensor in inputs if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    return any(unpack_dual(tensor).tangent is not None for tensor in given)


def _expert_sums_shapes(
    x: Tensor, source: Tensor, weight: Tensor | None, counts: Tensor, fc1_weight: Tensor,
    fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, activation: int, keep: Tensor | None,
    scale: float, for_backward: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inner_RF = x.new_empty(source.size(0) if for_backward else 0, fc1_weight.size(1))
    return x.new_empty(x.shape, dtype=None if weight is None else weight.dtype), inner_RF


def _expert_gradients_shapes(
    grad_y: Tensor, inner: Tensor, x: Tensor, source: Tensor, weight: Tensor | None, counts: Tensor,
    fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, activation: int,
    keep: Tensor | None, scale: float, wanted: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    inputs = (x, weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if tensor is not None and is_wanted
        else None
        for tensor, is_wanted in zip(inputs, wanted, strict=True)
    )
