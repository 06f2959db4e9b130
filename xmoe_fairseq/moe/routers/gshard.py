"""GShard's layer as fairscale wrote it (MOELayer with Top2Gate), for comparison with a peer's code.

Lepikhin et al. 2020, arXiv 2006.16668. This file only adapts: what routes, drops and computes is fairscale's.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe.experts.feed_forward import FeedForward
from xmoe_fairseq.moe.experts.kernels import AUTO, Activation
from xmoe_fairseq.moe.finite import check_scores, may_overflow
from xmoe_fairseq.moe.losses import z_loss
from xmoe_fairseq.moe.recompute import first_scores
from xmoe_fairseq.moe.routed_layer import RoutedLayer
from xmoe_fairseq.moe.routers.registry import RouterKind, register_router
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.stats import RoutingStats, RowCounts

TOP = 2


@register_router("gshard")
class GShardLayer(RouterKind, RoutedLayer):
    """The two experts of a token share its output by renormalised probabilities; an expert takes 2T/E rows.

    That capacity, and the noise in the choice of the second expert, are there in evaluation too, so results
    depend on the batch and are not quite causal. Padding takes no part. fairscale wants a multiple of E
    tokens: the batch's first ones are repeated up to it, and their outputs left out again.
    Its dispatch is a product with a (T, E, 2T/E) mask: memory and time grow with T squared.
    """

    description = (
        "two, the second with noise; fairscale's own `MOELayer` and `Top2Gate`, which keep 2T/E tokens "
        "per expert"
    )
    depends_on_batch = "yes"
    has_own_capacity = True

    def __init__(
        self, model_dim: int, expert_dim: int, num_experts: int, activation: Activation,
        activation_dropout: float = 0.0, dense_ffn_dim: int | None = None, name: str = "GShard layer",
        side: str = "",
    ) -> None:  # fmt: skip
        router_flops = 2 * model_dim * num_experts
        super().__init__(model_dim, expert_dim, num_experts, router_flops, dense_ffn_dim, name, side)
        if num_experts < TOP:
            raise ValueError(f"num_experts must be at least {TOP} for GShard, got {num_experts}")
        if expert_dim < 1:
            raise ValueError(f"expert_dim must be at least 1, got {expert_dim}")
        from fairscale.nn.moe import MOELayer, Top2Gate  # its imports take a second

        sizes = (model_dim, expert_dim, activation, activation_dropout)
        experts = nn.ModuleList(FeedForward(*sizes) for _ in range(num_experts))
        self.gshard = MOELayer(Top2Gate(model_dim, num_experts), experts, group=OnlyThisProcess())
        for parameter in self.gshard.parameters():
            vars(parameter).pop(
                "expert", None
            )  # fairscale's mark for DDP to skip it; here all ranks have all
        self.gshard.gate.wg.register_forward_hook(lambda _, __, logits_SE: first_scores(logits_SE))

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        return "at most ", TOP

    @classmethod
    def check(cls, config: Any, num_layers: int) -> None:
        size, kernel, experts = config.moe_expert_parallel_size, config.moe_kernel, config.moe_num_experts
        scale = config.moe_output_scale
        here = "with --moe-router gshard"
        if size != 1:
            why = "(fairscale exchanges equal numbers of tokens only)"
            raise ValueError(f"--moe-expert-parallel-size must be 1 {here} {why}, got {size}")
        if kernel != AUTO:
            raise ValueError(f"--moe-kernel must be auto {here}, whose experts are fairscale's, got {kernel}")
        if scale != 1:
            raise ValueError(f"--moe-output-scale must be 1 {here}, whose sums are fairscale's, got {scale}")
        if experts < TOP:
            raise ValueError(f"--moe-num-experts must be at least {TOP} {here}, got {experts}")

    def forward_tokens(self, x_TD: Tensor, ids_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        num_tokens = x_TD.size(0)
        x_SD = fill_up(x_TD, self.num_experts)
        # fairscale multiplies x by an fp32 mask: a half-precision model needs autocast for that.
        is_half = x_SD.dtype in (torch.float16, torch.bfloat16)
        cast = torch.autocast(x_SD.device.type, x_SD.dtype) if is_half else nullcontext()
        with cast, outputs_of(self.gshard.gate.wg, self.gshard.gate) as outputs:
            y_SD = self.gshard(x_SD.unsqueeze(1)).squeeze(1)
        del self.gshard.l_aux  # it would keep this batch's graph until the next one
        logits_SE, (l_aux, combine_SEC, _) = outputs
        finite = None if may_overflow(self, x_TD) else check_scores(x_TD, logits_SE[:num_tokens])
        routing = self.routing(logits_SE, l_aux, combine_SEC, num_tokens)
        return y_SD[:num_tokens], replace(routing, finite=finite)

    def routing(self, logits_SE: Tensor, l_aux: Tensor, combine_SEC: Tensor, num_tokens: int) -> Routing:
        """What fairscale did with the first `num_tokens` of S tokens."""
        logits_TE = logits_SE[:num_tokens].float()
        weights_TE = combine_SEC[:num_tokens].sum(dim=-1, dtype=torch.float32)
        token_R, expert_R = weights_TE.detach().nonzero(as_tuple=True)
        # mean_e(p * first choices), where Switch has E * sum_e; as elsewhere 1 is an even load.
        balance = l_aux.float() * self.num_experts**2
        return Routing(
            token_R=token_R,
            expert_R=expert_R,
            rank_R=(logits_TE.argmax(dim=-1)[token_R] != expert_R).long(),
            weight_R=weights_TE[token_R, expert_R],
            probs_TE=torch.softmax(logits_TE, dim=-1),
            rows_wanted=TOP * num_tokens,
            load_balance_of=lambda: balance if num_tokens else balance * 0.0,
            z_loss_of=partial(z_loss, logits_TE),
        )

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        return self.gshard.experts.parameters()  # type: ignore[no-any-return]

    def rows_computed(self, stats: RoutingStats | RowCounts) -> Any:
        """All slots, used or not: E experts of 2S/E rows each, S tokens after filling up."""
        return TOP * self.num_experts * -(-stats.tokens // self.num_experts)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


def fill_up(x_TD: Tensor, multiple: int) -> Tensor:
    """(S, D): the tokens, then the first ones again (zeros if there are none), S a multiple and not 0."""
    num_tokens = x_TD.size(0)
    if num_tokens == 0:
        return F.pad(x_TD, (0, 0, 0, multiple))
    missing = -num_tokens % multiple
    return x_TD[torch.arange(num_tokens + missing, device=x_TD.device) % num_tokens] if missing else x_TD


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[list[Any]]:
    """What these modules return inside the `with` block, in order of their calls."""
    outputs: list[Any] = []
    handles = [m.register_forward_hook(lambda _, __, output: outputs.append(output)) for m in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class OnlyThisProcess(dist.ProcessGroup):
    """A group of one, which holds all experts: what it sends comes back. Needs no torch.distributed.

    fairscale exchanges equally many rows between the ranks of a group, but fairseq's ranks have different
    numbers of tokens; so each rank is a group of its own.
    """

    def __init__(self) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]  # the stub lacks this one

    def all_to_all_single(self, output: Tensor, sent: Tensor, *_: Any) -> None:  # type: ignore[override]
        output.copy_(sent)

    alltoall_base = all_to_all_single  # type: ignore[assignment]  # its older name

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnlyThisProcess":
        return self
