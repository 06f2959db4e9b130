"""What is compared: the layer, the floor under it, the paper's way to execute it, and what others offer.

Every subject is `(module, function of x)`; x is (T, D). All use ReLU or what the peer has built in.
"""

import copy
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import forward, forward_backward, leaves_of
from xmoe_fairseq.moe import Experts, MoELayer, ThresholdRouter
from xmoe_fairseq.moe.experts import ExpertRows
from xmoe_fairseq.moe.native import missing
from xmoe_fairseq.moe.native.build import COMMAND
from xmoe_fairseq.moe.routers.gshard import OnlyThisProcess
from xmoe_fairseq.thresholds.search import bisect

MAX_PER_TOKEN = 32  # cap of the layer's router, so that sorting costs what it costs in practice


class DenseFFN(nn.Module):
    """fairseq's: two linear maps with a ReLU."""

    def __init__(self, model_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(model_dim, ffn_dim), nn.Linear(ffn_dim, model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Floor(nn.Module):
    """The dense products of an expert's shape on as many rows as the layer computes; nothing else."""

    def __init__(self, model_dim: int, expert_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(expert_dim, model_dim) / math.sqrt(model_dim))
        self.w2 = nn.Parameter(torch.randn(model_dim, expert_dim) / math.sqrt(expert_dim))

    def forward(self, rows_RD: Tensor) -> Tensor:
        return F.linear(F.linear(rows_RD, self.w1), self.w2)


class PaperStyleExperts(nn.Module):
    """In place of Experts, as in the authors' code: one expert after the other takes its `capacity_factor *
    T / E` most probable tokens, computes all of them and adds them with a weight, 0 where nobody chose it.

    A parameter per expert, as in a list of nn.Linear, in the stacks' memory.
    """

    def __init__(self, experts: Experts, capacity_factor: float) -> None:
        super().__init__()
        self.capacity_factor, self.activation = capacity_factor, experts.activation
        self.stacks = nn.ModuleList(
            nn.ParameterList(map(nn.Parameter, stack.detach().unbind())) for stack in experts.stacked()
        )

    def forward(self, x_SD: Tensor, rows: ExpertRows) -> Tensor:
        num_experts = rows.counts_E.numel()
        capacity = min(math.ceil(x_SD.size(0) / num_experts * self.capacity_factor), x_SD.size(0))
        expert_R = torch.repeat_interleave(rows.counts_E, output_size=rows.source_R.numel())
        weight_SE = rows.weight_R.new_zeros(x_SD.size(0), num_experts)
        weight_SE = weight_SE.index_put((rows.source_R, expert_R), rows.weight_R)  # type: ignore[arg-type]
        return self.compute(x_SD, weight_SE, weight_SE.detach().topk(capacity, dim=0).indices)

    def compute(self, x_SD: Tensor, weight_SE: Tensor, source_CE: Tensor) -> Tensor:
        y_SD = torch.zeros_like(x_SD)
        for e, weights in enumerate(zip(*self.stacks, strict=True)):
            source = source_CE[:, e]
            y_SD[source] += self.expert(x_SD[source], *weights) * weight_SE[:, e][source].unsqueeze(1)
        return y_SD

    def expert(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, w1, b1)), w2, b2)


class SlotExperts(PaperStyleExperts):
    """The same slots without needless copies: gathered at once, and added at once."""

    def compute(self, x_SD: Tensor, weight_SE: Tensor, source_CE: Tensor) -> Tensor:
        source_R = source_CE.t().reshape(-1)
        slots = x_SD.index_select(0, source_R).split(source_CE.size(0))
        parts = [self.expert(x, *weights) for x, *weights in zip(slots, *self.stacks, strict=True)]
        weight_R1 = weight_SE.gather(0, source_CE).t().reshape(-1, 1)
        return torch.zeros_like(x_SD).index_add(0, source_R, torch.cat(parts) * weight_R1)


# The paper's way to execute it, and what of its cost is not the slots'.
EVERY_SLOT = {"paper's way": PaperStyleExperts, "its slots, no needless copies": SlotExperts}


def with_every_slot(layer: MoELayer, way: type[PaperStyleExperts], capacity_factor: float) -> MoELayer:
    """The same router and experts, with capacity slots for the tokens that fit; equal outputs if all do."""
    other = copy.copy(layer)
    other._modules = {**layer._modules, "experts": way(layer.experts, capacity_factor)}
    return other


def kernels() -> list[str]:
    """Those of a CPU that can be asked for here."""
    return [kernel for kernel in ("native", "plain") if kernel == "plain" or not missing()]


def kernels_left_out() -> Iterator[str]:
    """A line if the native kernel is not there."""
    if reason := missing():
        yield f"Without the native kernel: {reason}; run: {COMMAND}"


def left_out() -> Iterator[str]:
    """What would be compared if it were installed, a line each."""
    yield from kernels_left_out()
    if not find_spec("transformers"):
        yield "Without Hugging Face's block: pip install transformers"


def moe_layer(x_TD: Tensor, num_experts: int, expert_dim: int, per_token: float) -> MoELayer:
    """A threshold layer whose t is such that these tokens take `per_token` experts on average."""
    router = ThresholdRouter(x_TD.size(1), num_experts, 0.5, min(MAX_PER_TOKEN, num_experts))
    set_experts_per_token(router, x_TD, per_token)
    return MoELayer(x_TD.size(1), expert_dim, num_experts, router)


def set_experts_per_token(router: ThresholdRouter, x_TD: Tensor, per_token: float) -> None:
    """Choose t such that these tokens take `per_token` experts on average."""

    def enough(threshold: float) -> bool:
        router.fix(threshold)
        return router(x_TD).experts_per_token >= per_token

    with torch.no_grad():
        router.weight.mul_(3.0)  # more decisive than at the start of training
        router.fix(bisect(enough, 1.0, 0.0, precision=2**-16))


def output_of(block: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The output; of an MoE layer with the load-balance loss in its graph, as in training."""

    def run() -> Tensor:
        if not isinstance(block, MoELayer):
            y: Tensor = block(x)
            return y
        y, routing = block(x)
        return y + 0.01 * routing.load_balance_loss if torch.is_grad_enabled() else y

    return run


def evaluation(block: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward without gradients."""
    return forward(output_of(block, x))


def training(block: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward."""
    return forward_backward(output_of(block, x), leaves_of(block, x), torch.randn_like(x))


def fairscale_layer(model_dim: int, num_experts: int, expert_dim: int) -> nn.Module | None:
    """fairscale's GShard layer: top-2, capacity 2 T / E, dispatch by einsum."""
    from fairscale.nn.moe import MOELayer, Top2Gate

    experts = nn.ModuleList([DenseFFN(model_dim, expert_dim) for _ in range(num_experts)])
    return MOELayer(Top2Gate(model_dim, num_experts), experts, group=OnlyThisProcess())


def transformers_block(
    model_dim: int, num_experts: int, expert_dim: int, per_token: int, implementation: str
) -> nn.Module | None:
    """Mixtral's block. Its experts are gated, three matrices instead of two: 2/3 as wide for equal FLOPs."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return None
    config = MixtralConfig(
        hidden_size=model_dim,
        intermediate_size=8 * round(expert_dim * 2 / 3 / 8),  # 16 bytes in bf16, for the grouped product
        num_local_experts=num_experts,
        num_experts_per_tok=per_token,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():  # made empty
        nn.init.normal_(parameter, std=model_dim**-0.5)
    return block
