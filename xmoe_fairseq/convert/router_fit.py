"""Routers for the parts of a dense FFN: probabilities that rank experts by what they contribute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.convert.ffn import FeedForward
from xmoe_fairseq.moe import TopKRouter

ROWS = 256  # tokens in one step of Adam: a choice, as its learning rate is


class Parts:
    """An FFN cut into E experts, and the mean of what each adds to the output.

    An expert that is left out is replaced by its mean: the expert itself computes the difference from it, and
    the layer's output bias holds the sum of the means and the bias of the dense FFN. With all experts the
    means cancel out.

    Args:
        neurons_EF: the neurons of each expert.
        mean_hidden_F: of the dense FFN's neurons.
        shared_N: those that compute every token; they are left out nowhere.
    """

    def __init__(self, ffn: FeedForward, neurons_EF: Tensor, mean_hidden_F: Tensor, shared_N: Tensor) -> None:
        self.ffn, self.neurons_EF, self.shared_N = ffn, neurons_EF, shared_N
        self.fc1_weight = ffn.fc1_weight[neurons_EF]  # (E, F/E, D)
        self.fc1_bias = ffn.fc1_bias[neurons_EF]
        self.fc2_weight = ffn.fc2_weight.t()[neurons_EF].transpose(1, 2).contiguous()  # (E, D, F/E)
        self.mean_ED = torch.einsum("edf,ef->ed", self.fc2_weight, mean_hidden_F[neurons_EF])

    def shares(self, x_TD: Tensor) -> Tensor:
        """(T, E) contributions: the length of what each expert adds, over the sum of these lengths."""
        hidden_EFT = self.ffn.hidden(x_TD).t()[self.neurons_EF]
        added_EDT = torch.bmm(self.fc2_weight, hidden_EFT) - self.mean_ED.unsqueeze(2)
        length_TE = added_EDT.norm(dim=1).t()
        return length_TE / length_TE.sum(dim=1, keepdim=True).clamp(min=1e-12)

    def state(self) -> dict[str, Tensor]:
        """Parameters of an MoELayer with `combine="ones"`, but for the router's."""
        shared_N, output_bias = self.shared_N, self.ffn.fc2_bias + self.mean_ED.sum(dim=0)
        shared = {
            "shared.fc1.weight": self.ffn.fc1_weight[shared_N],
            "shared.fc1.bias": self.ffn.fc1_bias[shared_N],
            "shared.fc2.weight": self.ffn.fc2_weight[:, shared_N],
            "shared.fc2.bias": torch.zeros_like(output_bias),
        }
        return {
            **(shared if shared_N.numel() else {}),
            "experts.fc1_weight": self.fc1_weight,
            "experts.fc1_bias": self.fc1_bias,
            "experts.fc2_weight": self.fc2_weight,
            "experts.fc2_bias": -self.mean_ED,
            "output_bias": output_bias,
        }


class RouterFit:
    """Fits scores whose softmax is the share that each expert contributes to a token, a batch at a time.

    The loss is the divergence from the shares: at its minimum a probability is the expected share, and t then
    means the share of the contributions that is kept.

    Args:
        steps: of Adam, in all; the learning rate falls to 0 over them.
        hidden_dim: of the router; 0 = linear scores.
    """

    def __init__(
        self, parts: Parts, steps: int, seed: int, hidden_dim: int = 0, lr: float = 0.01
    ) -> None:  # fmt: skip
        num_experts, model_dim = parts.neurons_EF.size(0), parts.ffn.fc1_weight.size(1)
        self.parts, self.router = parts, TopKRouter(model_dim, num_experts)
        if hidden_dim:
            self.router.score_by_hidden(hidden_dim)
        torch.nn.init.zeros_(self.router.weight)
        betas = (0.9, 0.98)  # as in finetune.py
        self.optimizer = torch.optim.Adam(self.router.parameters(), lr=lr, betas=betas)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, max(steps, 1))
        self.generator = torch.Generator().manual_seed(seed)
        self.excess = 0.0  # running mean of the divergence from the shares, in nats

    def state(self) -> dict[str, Tensor]:
        """Parameters of the MoELayer."""
        router = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        return {**self.parts.state(), **router}

    def add(self, x_TD: Tensor) -> None:
        shares_TE = self.parts.shares(x_TD)
        order_T = torch.randperm(x_TD.size(0), generator=self.generator)
        for rows in order_T.split(ROWS):
            self.step(x_TD[rows], shares_TE[rows])

    def step(self, x_TD: Tensor, shares_TE: Tensor) -> None:
        with torch.enable_grad():
            log_probs_TE = F.log_softmax(self.router.score(x_TD), dim=1)
            loss = F.kl_div(log_probs_TE, shares_TE, reduction="batchmean")
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.schedule.step()
        excess = float(loss.detach())
        self.excess += 0.02 * (excess - self.excess) if self.excess else excess  # over some 50 steps
