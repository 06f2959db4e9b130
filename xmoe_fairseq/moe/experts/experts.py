"""The small FFNs: E two-layer networks with stacked weights."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import AUTO, Activation, Call, Stacks, check_kernel, expert_sums

ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
# Modules that draw and learn nothing, as the functions that the fast kernels know.
FUNCTIONS: dict[type, Activation] = {nn.ReLU: F.relu, nn.SiLU: F.silu, nn.Tanh: torch.tanh}


class Experts(nn.Module):
    """`FFN_e(x) = fc2_e(activation(fc1_e(x)))` for E experts of width F, in the `nn.Linear` convention.

    Args:
        num_experts: E.
        model_dim: D.
        expert_dim: hidden width F of one expert.
        activation: a name in ACTIVATIONS, or any function or module; fast are relu, gelu, silu (torch's
            modules of these names too) and, on a GPU, tanh.
        activation_dropout: dropout probability after the activation.
        part: (i, N) = hold the i-th of N equal slices of the E experts; E must be divisible by N. Whole
            state dicts load into any part.
        kernel: what computes them, a name in `kernels.kernel_names()`; "auto" chooses by the call.
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        expert_dim: int,
        activation: str | Activation = "relu",
        activation_dropout: float = 0.0,
        part: tuple[int, int] = (0, 1),
        kernel: str = AUTO,
    ) -> None:
        super().__init__()
        index, parts = part
        if expert_dim < 1:
            raise ValueError(f"expert_dim must be at least 1, got {expert_dim}")
        if not 0 <= activation_dropout <= 1:
            raise ValueError(f"activation_dropout must be in [0, 1], got {activation_dropout}")
        if num_experts % parts or not 0 <= index < parts:
            raise ValueError(f"part (i, N) must have 0 <= i < N and N divide {num_experts}, got {part}")
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            rule = f"must be one of {sorted(ACTIVATIONS)} or a function"
            raise ValueError(f"activation {rule}, got {activation!r}")
        check_kernel(kernel)
        self.kernel, self.num_experts = kernel, num_experts
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else _as_function(activation)
        self.activation_dropout = activation_dropout
        self.dropout_in_evaluation = False  # see MoELayer.retain_dropout
        held = num_experts // parts
        self.first = index * held  # id of the first expert held here
        self.fc1_weight = nn.Parameter(torch.empty(held, expert_dim, model_dim))
        self.fc1_bias = nn.Parameter(torch.empty(held, expert_dim))
        self.fc2_weight = nn.Parameter(torch.empty(held, model_dim, expert_dim))
        self.fc2_bias = nn.Parameter(torch.empty(held, model_dim))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.0) -> None:
        """Draw every expert independently, as `nn.Linear` does, from a generator of its own.

        Expert e depends on torch's seed and on e alone, so a slice of the experts starts the same
        whoever holds it.

        Args:
            std: draw weights from N(0, std^2) instead, and set biases to 0.
        """
        if self.fc1_weight.is_meta:  # nothing to draw into
            return
        base_seed = int(torch.randint(2**62, (1,), device="cpu"))
        bounds = [1 / math.sqrt(w.size(-1)) for w in (self.fc1_weight, self.fc2_weight)]
        with torch.no_grad():
            for expert, (w1, b1, w2, b2) in enumerate(zip(*self.stacked(), strict=True), self.first):
                generator = torch.Generator("cpu").manual_seed(base_seed + expert)
                for parameter, bound in ((w1, bounds[0]), (b1, bounds[0]), (w2, bounds[1]), (b2, bounds[1])):
                    drawn = torch.empty(parameter.shape, device="cpu")
                    if not std:
                        drawn.uniform_(-bound, bound, generator=generator)
                    elif parameter.dim() > 1:
                        drawn.normal_(0.0, std, generator=generator)
                    else:
                        drawn.zero_()
                    parameter.copy_(drawn)

    def stacked(self) -> Stacks:
        return Stacks(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)

    def forward(self, x_SD: Tensor, rows: ExpertRows) -> Tensor:
        """(S, D): for each source row the weighted sum of what its experts make of it; 0 for one without.

        The result is in the precision of the weights, where there are any, in which the sums are taken.
        """
        dropout = self.activation_dropout if self.training or self.dropout_in_evaluation else 0.0
        return expert_sums(Call(x_SD, rows, self.stacked(), self.activation, dropout), self.kernel)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """torch's extension point. A state dict may hold all experts: this part takes its own."""
        own = {
            prefix + name: slice_experts(state_dict[prefix + name], self.num_experts, parameter, self.first)
            for name, parameter in self.named_parameters()
            if prefix + name in state_dict
        }
        super()._load_from_state_dict({**state_dict, **own}, prefix, *args)

    def extra_repr(self) -> str:
        held, expert_dim, model_dim = self.fc1_weight.shape
        part = "" if held == self.num_experts else f", holds {self.first} to {self.first + held - 1}"
        sizes = f"num_experts={self.num_experts}, model_dim={model_dim}, expert_dim={expert_dim}"
        return f"{sizes}, kernel={self.kernel}{part}"


def _as_function(activation: Activation) -> Activation:
    if type(activation) is nn.GELU and activation.approximate == "none":
        return F.gelu
    return FUNCTIONS.get(type(activation), activation)


def slice_experts(whole: Any, num_experts: int, held: Tensor, first: int) -> Any:
    """Of a stack of all experts the rows that `held` is for; else (a part, a wrong shape) as it is."""
    is_stack = isinstance(whole, Tensor) and whole.dim() and whole.size(0) == num_experts
    return whole[first : first + held.size(0)] if is_stack and whole.shape[1:] == held.shape[1:] else whole
