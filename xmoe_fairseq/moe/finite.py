"""NaN and inf where tokens choose are an error. A GPU's host learns of it when it reads something anyway."""

import math

import torch
from torch import Tensor, nn


def can_read(tensor: Tensor) -> bool:
    """Whether the host may look into it: it waits for no device, and breaks no compiled graph."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def check_scores(x_TD: Tensor, score_TE: Tensor) -> Tensor | None:
    """None; or if the host would have to wait, for `check_finite`: 0, NaN if a score is not finite.

    Raises:
        FloatingPointError: a score is NaN or inf, as it always is if the token holds one.
    """
    if not can_read(score_TE):
        return (score_TE.detach() * 0).sum()
    if bad := not_finite(score_TE):
        if not torch.isfinite(x_TD).all():
            raise FloatingPointError(f"router input holds NaN or inf in {bad}")
        raise FloatingPointError(f"router scores are NaN or inf in {bad}, though the input is finite")
    return None


def not_finite(score_TE: Tensor) -> str:
    """In how many tokens there is NaN or inf; "" if in none."""
    # A sum of all is quick, and finite only if every value is; if it is not, it may just have overflowed.
    if math.isfinite(score_TE.detach().sum().item()):
        return ""
    finite_T = torch.isfinite(score_TE.detach()).all(dim=-1)
    return "" if finite_T.all() else f"{int((~finite_T).sum())} of {len(finite_T)} tokens"


def may_overflow(router: nn.Module, x_TD: Tensor) -> bool:
    """Whether this is training in fp16, where now and then something overflows: the NaN goes through to the
    gradients, whose loss scaler skips the update. All ranks see it in the norm, and decide alike."""
    device = x_TD.device.type
    is_autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return router.training and (x_TD.dtype == torch.float16 or is_autocast)
