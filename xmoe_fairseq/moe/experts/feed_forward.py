"""An ordinary two-layer network: what shared experts are together, and each of fairscale's own."""

import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.experts.kernels import Activation


class FeedForward(nn.Module):
    """`fc2(dropout(activation(fc1(x))))` of inner width F, initialised as `nn.Linear`."""

    def __init__(self, model_dim: int, inner_dim: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(model_dim, inner_dim)
        self.fc2 = nn.Linear(inner_dim, model_dim)
        self.activation = activation
        self.dropout = dropout
        self.dropout_in_evaluation = False  # see MoELayer.retain_dropout

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training or self.dropout_in_evaluation
        hidden = F.dropout(self.activation(self.fc1(x)), self.dropout, drops)
        return self.fc2(hidden)  # type: ignore[no-any-return]
