"""The MoE layer: route, dispatch, compute, combine."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmoe_fairseq.moe.capacity import check_capacities, expert_capacity, keep_within_capacity
from xmoe_fairseq.moe.cheap import CheapExperts
from xmoe_fairseq.moe.dispatch.gather_sum import BySource, gather_rows, sum_rows
from xmoe_fairseq.moe.dispatch.parallel import dispatcher_for
from xmoe_fairseq.moe.experts.experts import Experts
from xmoe_fairseq.moe.experts.feed_forward import FeedForward
from xmoe_fairseq.moe.experts.kernels import AUTO, Activation
from xmoe_fairseq.moe.routed_layer import RoutedLayer
from xmoe_fairseq.moe.routers.base import TokenRouter
from xmoe_fairseq.moe.routing import Routing

COMBINE = ("probs", "ones", "normalized")


class MoELayer(RoutedLayer):
    """`y_t = sum_e w[t, e] * FFN_e(x_t)` over the experts that token t chose (arXiv 2403.18926, eq. 1).

    Only the chosen (token, expert) rows are computed. Padding takes no part (`RoutedLayer`).

    Shared experts compute every token, with weight 1, and their sum is added to y_t (Dai et al. 2024,
    DeepSeekMoE, eq. 9, arXiv 2401.06066). One FFN n times as wide is what n of them are together. It is as
    any dense parameter: on several ranks each has all of it.

    Cheap experts are chosen as the others are, and compute next to nothing; see `CheapExperts`.

    The weights w are the router's probabilities. With `combine="normalized"` these over their sum over the
    token's experts, so softmax over the chosen scores (Shazeer et al. 2017, arXiv 1701.06538, eq. 3). With
    `combine="ones"` they are 1, and every token gets one `output_bias`: parts of a dense FFN then add up to
    what it computed.

    Args:
        model_dim: width D of a token.
        expert_dim: hidden width F of one expert.
        num_experts: number of experts E.
        router: for D and E, or E + Z with cheap experts.
        capacity_factor: in training an expert keeps at most ceil(T / E * capacity_factor) rows; 0 = all.
        eval_capacity_factor: the same in evaluation.
        min_capacity: an expert may always keep this many rows.
        activation: name, function or module between the two linear maps of an expert; see `Experts`.
        activation_dropout: dropout probability after the activation.
        dense_ffn_dim: width of the FFN that this layer replaces, for counting FLOPs; None = expert_dim.
        name: what error messages call this layer.
        expert_parallel_group: the experts lie in equal slices on the ranks of this group; None = all here.
        combine: "probs", "normalized", or "ones" for `output_bias_D + sum_e FFN_e(x_t)`, over the chosen.
        side: "encoder" or "decoder", for statistics; "" = neither.
        kernel: what computes the experts; see `Experts`.
        output_scale: all weights times this, whatever they are; not the output bias, shared or cheap experts.
        shared_experts: n, beside the E that are routed; 0 = none.
        cheap: Z experts more to choose from; None = none.
    """

    def __init__(
        self, model_dim: int, expert_dim: int, num_experts: int, router: TokenRouter,
        capacity_factor: float = 0.0, eval_capacity_factor: float = 0.0, min_capacity: int = 4,
        activation: str | Activation = "relu", activation_dropout: float = 0.0,
        dense_ffn_dim: int | None = None, name: str = "MoE layer",
        expert_parallel_group: dist.ProcessGroup | None = None, combine: str = "probs", side: str = "",
        kernel: str = AUTO, output_scale: float = 1.0, shared_experts: int = 0,
        cheap: CheapExperts | None = None,
    ) -> None:  # fmt: skip
        num_cheap = 0 if cheap is None else len(cheap)
        given, expected = (router.num_experts, router.model_dim), (num_experts + num_cheap, model_dim)
        if given != expected:
            raise ValueError(f"router must be for (num_experts, model_dim) = {expected}, got {given}")
        check_weights(combine, output_scale, num_cheap)
        if shared_experts < 0:
            raise ValueError(f"shared_experts must be 0 (none) or more, got {shared_experts}")
        check_capacities(capacity_factor, eval_capacity_factor, min_capacity)
        flops = router.flops_per_token
        super().__init__(model_dim, expert_dim, num_experts, flops, dense_ffn_dim, name, side)
        self.router, self.cheap, self.num_cheap = router, cheap, num_cheap
        if cheap is not None:
            router.num_cheap, router.cheap_balance = num_cheap, cheap.balance
        self.dispatcher, part = dispatcher_for(expert_parallel_group)
        sizes = (num_experts, model_dim, expert_dim)
        self.experts = Experts(*sizes, activation, activation_dropout, part, kernel)
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.combine, self.output_scale = min_capacity, combine, output_scale
        self.shared_experts, self.shared = shared_experts, None
        if shared_experts:
            widths = (model_dim, shared_experts * expert_dim)
            self.shared = FeedForward(*widths, self.experts.activation, activation_dropout)
        self.output_bias: nn.Parameter | None = None
        if combine == "ones":  # a bias that counts once, whatever is chosen; of the experts' the sum would
            self.output_bias = nn.Parameter(torch.zeros(model_dim))
            nn.init.zeros_(self.experts.fc2_bias)

    def forward_tokens(self, x_TD: Tensor, ids_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.route(x_TD, ids_T)
        if self.cheap is not None:
            routing, weight_TZ = self.cheap.take_out(routing)
        routing = self.weigh(routing, x_TD)
        x_SD, rows, sent = self.dispatcher.dispatch(x_TD, routing)
        y_TD = self.dispatcher.combine(self.experts(x_SD, rows), sent)
        if self.cheap is not None:
            y_TD = y_TD + self.cheap(x_TD, weight_TZ)
        if self.shared is not None:
            y_TD, routing = y_TD + self.shared(x_TD), replace(routing, shared_experts=self.shared_experts)
        return y_TD if self.output_bias is None else y_TD + self.output_bias, routing

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Routing:
        routing: Routing = self.router(x_TD, ids_T)
        if wrong := check_routing(routing, x_TD.size(0), self.router.num_experts):
            raise ValueError(f"{self.name}: {type(self.router).__name__} must give {wrong}")
        return routing

    def limit(self, routing: Routing) -> Routing:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor == 0:
            return routing
        capacity = expert_capacity(routing.num_tokens, self.num_experts, factor, self.min_capacity)
        return keep_within_capacity(routing, capacity)

    def weigh(self, chosen: Routing, x_TD: Tensor) -> Routing:
        """What is left of a choice within the capacity, with its weights."""
        routing = self.limit(chosen)
        if self.combine == "normalized":
            routing = normalize(routing, chosen)
        elif self.combine == "ones":
            routing = weigh_one(routing, x_TD)
        if self.output_scale == 1.0:
            return routing
        return replace(routing, weight_R=routing.weight_R * self.output_scale, all_ones=False)

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    def to_log(self) -> dict[str, Tensor | float]:
        return self.router.to_log()

    def extra_repr(self) -> str:
        return (
            f"capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}, "
            f"min_capacity={self.min_capacity}, combine={self.combine}, output_scale={self.output_scale}, "
            f"shared_experts={self.shared_experts}"
        )


def check_weights(combine: str, output_scale: float, num_cheap: int) -> None:
    """Raises ValueError."""
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine}")
    if num_cheap and combine != "probs":
        raise ValueError(f"combine must be probs with cheap experts, got {combine}")
    if not 0 < output_scale < math.inf:
        raise ValueError(f"output_scale must be above 0 and finite, got {output_scale}")


def check_routing(routing: Routing, num_tokens: int, num_experts: int) -> str:
    """What of a router of one's own would go wrong unseen, in some kernels only or in evaluation; or ""."""
    weight_R, sizes = routing.weight_R, (num_tokens, num_experts)
    if routing.probs_TE.shape != sizes:
        return f"probs_TE of shape {sizes}, got {tuple(routing.probs_TE.shape)}"
    for name in ("token_R", "expert_R", "rank_R"):
        if getattr(routing, name).shape != (weight_R.numel(),):
            shape = tuple(getattr(routing, name).shape)
            return f"{name} of the size of weight_R, ({weight_R.numel()},), got {shape}"
    if weight_R.dim() != 1 or not weight_R.is_floating_point() or weight_R.element_size() < 4:
        return f"weight_R (R,) in torch.float32 at least, got {weight_R.dtype}, {tuple(weight_R.shape)}"
    return ""


def normalize(routing: Routing, chosen: Routing) -> Routing:
    """Weights over their sum over all that a token chose: what a capacity drops is missing, but changes no
    other weight. A single expert weighs 1, and teaches the router nothing."""
    order = BySource.of(chosen.token_R, chosen.num_tokens)
    sum_T1 = sum_rows(chosen.weight_R.unsqueeze(1), order)
    if routing is not chosen:
        order = BySource.of(routing.token_R, routing.num_tokens)
    return replace(routing, weight_R=routing.weight_R / gather_rows(sum_T1, order).squeeze(1))


def weigh_one(routing: Routing, x_TD: Tensor) -> Routing:
    """Every chosen expert counts 1, but the router still learns: as if the weight were 1 + p - p.

    The gradient that a probability would get as a weight (how much more of this expert's output would help)
    goes through softmax to the scores, so an expert that helps a token gains mass from those that do not.
    Without it a choice, which is a step function, would teach the router nothing.
    """
    weight_R = routing.weight_R
    if weight_R.requires_grad:
        return replace(routing, weight_R=1.0 + (weight_R - weight_R.detach()))
    # In half precision the weights stay: it is they that make the sums fp32.
    is_fp32 = x_TD.dtype == weight_R.dtype and not torch.is_autocast_enabled(x_TD.device.type)
    return replace(routing, weight_R=torch.ones_like(weight_R), all_ones=is_fp32)
