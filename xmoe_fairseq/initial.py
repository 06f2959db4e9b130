"""Initial weights other than fairseq's."""

import torch
from torch import nn

from xmoe_fairseq.moe import Experts, Router


def draw_normal(model: nn.Module, std: float) -> None:
    """All weight matrices, embeddings, routers and experts from N(0, std^2), their biases 0; norms stay."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.reset_parameters(std)
        elif isinstance(module, nn.Linear | nn.Embedding | Router):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():  # last, because an output layer may share an embedding's weight
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


@torch.no_grad()
def scale_routers(model: nn.Module, scale: float) -> None:
    """Multiply the routers' initial weights: below 1 they begin nearer to uniform, above 1 more decisive."""
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.mul_(scale)
