"""Other ways to execute the same experts, and other people's layers, for a GPU."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.experts import Activation, ExpertRows, Stacks, register_kernel
from xmoe_fairseq.moe.experts.plain import expert_sums_plain
from xmoe_fairseq.moe.experts.products import lacks

TORCHTITAN = "torchtitan"


@register_kernel(TORCHTITAN, lacks)
def expert_sums_torchtitan(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """As in torchtitan's `LocalTokenDispatcher` and `GroupedExperts` (main of 2026-08-21, b5bcd76), which
    pads no more: rows are gathered, products of all experts, weights in fp32, a sum by `scatter_add` in x's
    precision, by torch's deterministic way. Its experts have no biases; these have.
    """
    num_experts, num_rows = rows.counts_E.numel(), rows.source_R.numel()
    if num_rows == 0:  # the product's backward raises without rows
        return expert_sums_plain(x_SD, rows, stacks, activation, dropout)
    offsets_E = rows.counts_E.cumsum(0, dtype=torch.int32)
    experts_E = torch.arange(num_experts, device=x_SD.device)
    expert_R = torch.repeat_interleave(experts_E, rows.counts_E, output_size=num_rows)
    x_RD = x_SD[rows.source_R]
    inner_RF = F.grouped_mm(x_RD, stacks.fc1_weight.transpose(1, 2), offs=offsets_E)
    hidden_RF = F.dropout(activation(inner_RF + stacks.fc1_bias[expert_R]), dropout, dropout > 0)
    y_RD = F.grouped_mm(hidden_RF, stacks.fc2_weight.transpose(1, 2), offs=offsets_E)
    y_RD = y_RD + stacks.fc2_bias[expert_R]
    if rows.weight_R is not None:
        y_RD = (y_RD.float() * rows.weight_R.unsqueeze(1)).to(y_RD.dtype)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return torch.zeros_like(x_SD).scatter_add(0, rows.source_R.unsqueeze(1).expand_as(y_RD), y_RD)
    finally:
        torch.use_deterministic_algorithms(before)


class BatchOfOne(nn.Module):
    """A block that wants batches and may return a tuple, as a function of (T, D)."""

    def __init__(self, block: nn.Module, afterwards: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.block, self.afterwards = block, afterwards

    def forward(self, x_TD: Tensor) -> Tensor:
        y = self.block(x_TD.unsqueeze(0))
        self.afterwards()
        return (y[0] if isinstance(y, tuple) else y).view(x_TD.shape)


def megablocks_layer(
    model_dim: int, num_experts: int, expert_dim: int, per_token: int, device: torch.device,
    dtype: torch.dtype, way: str,
) -> nn.Module:  # fmt: skip
    """MegaBlocks' dropless layer, top-k, ReLU. Raises what it raises where it, or what this way needs, is
    missing or does not fit the Triton that is there.

    Its load-balance losses, which it keeps for the end of a step with their graphs, are dropped.
    """
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE
    from megablocks.layers.moe import clear_load_balancing_loss

    normal = partial(nn.init.normal_, std=model_dim**-0.5)
    arguments = Arguments(
        hidden_size=model_dim, ffn_hidden_size=expert_dim, moe_num_experts=num_experts,
        moe_top_k=per_token, activation_fn=F.relu, mlp_type="mlp", mlp_impl=way, bias=False,
        return_bias=False, fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16, device=device,
        init_method=normal, output_layer_init_method=normal,
    )  # fmt: skip
    return BatchOfOne(dMoE(arguments).to(device, dtype), clear_load_balancing_loss)
