"""What a kernel of the experts gives: values and every gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from xmoe_fairseq.moe import MoELayer
from xmoe_fairseq.moe.experts import Activation, ExpertRows, Stacks


def values_and_gradients(
    compute: Callable[..., Tensor], x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation
) -> list[Tensor]:
    """y, and the gradients of x, the stacks and, if there are any, the weights."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x_SD, *stacks)]
    if rows.weight_R is not None:
        leaves.append(rows.weight_R.detach().requires_grad_())
        rows = ExpertRows(rows.source_R, leaves[-1], rows.counts_E)
    y_SD = compute(leaves[0], rows, Stacks(*leaves[1:5]), activation)
    direction_SD = torch.linspace(-1, 2, y_SD.numel(), dtype=y_SD.dtype).view(y_SD.shape)
    y_SD.backward(direction_SD)
    return [y_SD.detach(), *(leaf.grad for leaf in leaves)]


def layer_values_and_gradients(layer: MoELayer, tokens: Tensor | list[Tensor]) -> list[Tensor]:
    """Of a batch of (D,) tokens: y, the gradients of tokens and parameters. Workers can import it."""
    x_TD = (torch.stack(tokens) if isinstance(tokens, list) else tokens.clone()).requires_grad_()
    y_TD, routing = layer(x_TD)
    loss = y_TD.square().sum() + routing.load_balance_loss
    return [y_TD.detach(), *torch.autograd.grad(loss, [x_TD, *layer.parameters()])]
