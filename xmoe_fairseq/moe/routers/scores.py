"""What a router scores by: linear in the token, or in a hidden layer of it. In fp32 at least."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HiddenLayer(nn.Linear):
    """`relu(W1 x + b1)` (T, H), of a router with `W2 relu(W1 x + b1)` as its scores.

    As the routers of Szatkowski et al. 2024 (D2DMoE), section 3.2, arXiv 2310.04361.
    """

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.relu(exact_linear(x_TD, self.weight) + self.bias)


def exact_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x W^T`."""
    if x_TD.dtype == weight_ED.dtype and x_TD.element_size() >= 4:
        return F.linear(x_TD, weight_ED)
    return _ExactLinear.apply(x_TD, weight_ED)  # type: ignore[no-untyped-call, no-any-return]


class _ExactLinear(torch.autograd.Function):
    """Kept for the backward pass is x as it was, half as large."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x_TD, weight_ED), (of_x, of_weight) = ctx.saved_tensors, ctx.needs_input_grad
        with torch.autocast(grad_TE.device.type, enabled=False):
            grad_x_TD = (grad_TE @ weight_ED.to(grad_TE)).to(x_TD) if of_x else None
            return grad_x_TD, (grad_TE.t() @ x_TD.to(grad_TE)).to(weight_ED) if of_weight else None
