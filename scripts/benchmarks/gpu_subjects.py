"""Other ways to execute the same experts, and other people's layers, for a GPU."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.experts import Activation, ExpertRows, Stacks, register_kernel
from xmoe_fairseq.moe.experts.plain import expert_sums_plain
from xmoe_fairseq.moe.experts.products import lacks

PADDED = "padded"
PADDED_TO = 16  # rows; torchtitan pads an expert's rows to a multiple of 8 (bf16) to 32


@register_kernel(PADDED, lacks)
def expert_sums_padded(
    x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """torchtitan's way: rows in the experts' order, each expert's padded with rows of zeros to a multiple.

    The buffer is as large as could be needed, so that the host need not know the counts; its end belongs to
    the last expert. Padding is read from, and its result added to, a row of zeros past the last source.
    """
    num_experts, num_rows = rows.counts_E.numel(), rows.source_R.numel()
    if num_rows == 0:  # the product's backward raises without rows
        return expert_sums_plain(x_SD, rows, stacks, activation, dropout)
    padded_E = (rows.counts_E + PADDED_TO - 1) // PADDED_TO * PADDED_TO
    size = num_rows + num_experts * (PADDED_TO - 1)
    ends_E = padded_E.cumsum(0)
    expert_R = torch.repeat_interleave(rows.counts_E, output_size=num_rows)
    moved_E = (ends_E - padded_E) - (rows.counts_E.cumsum(0) - rows.counts_E)
    place_R = torch.arange(num_rows, device=x_SD.device) + moved_E[expert_R]
    source_P = torch.full((size,), x_SD.size(0), device=x_SD.device).index_copy(0, place_R, rows.source_R)
    expert_P = torch.full((size,), num_experts - 1, device=x_SD.device).index_copy(0, place_R, expert_R)
    offsets_E = torch.cat([ends_E[:-1], ends_E.new_full((1,), size)]).to(torch.int32)
    x_PD = F.pad(x_SD, (0, 0, 0, 1)).index_select(0, source_P)
    inner_PF = F.grouped_mm(x_PD, stacks.fc1_weight.transpose(1, 2), offs=offsets_E)
    hidden_PF = activation(inner_PF + stacks.fc1_bias.index_select(0, expert_P))
    hidden_PF = F.dropout(hidden_PF, dropout, dropout > 0)
    y_PD = F.grouped_mm(hidden_PF, stacks.fc2_weight.transpose(1, 2), offs=offsets_E)
    y_RD = y_PD.index_select(0, place_R) + stacks.fc2_bias.index_select(0, expert_R)
    return rows.weighted_sum(y_RD, x_SD.size(0))


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
    model_dim: int, num_experts: int, expert_dim: int, per_token: int, device: torch.device, way: str
) -> nn.Module | None:
    """MegaBlocks' dropless layer, top-k, ReLU; None where it, or what this way needs, is not installed.

    Its load-balance losses, which it keeps for the end of a step with their graphs, are dropped.
    """
    try:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE
        from megablocks.layers.moe import clear_load_balancing_loss

        normal = partial(nn.init.normal_, std=model_dim**-0.5)
        arguments = Arguments(
            hidden_size=model_dim, ffn_hidden_size=expert_dim, moe_num_experts=num_experts,
            moe_top_k=per_token, activation_fn=F.relu, mlp_type="mlp", mlp_impl=way, bias=False,
            return_bias=False, fp16=False, bf16=True, device=device,
            init_method=normal, output_layer_init_method=normal,
        )  # fmt: skip
        layer = dMoE(arguments)
    except (ImportError, AssertionError, RuntimeError):  # asks for grouped_gemm or stk only when built
        return None
    return BatchOfOne(layer.to(device, torch.bfloat16), clear_load_balancing_loss)
