"""The MoE layer: route, dispatch, compute, combine."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xmoe_fairseq.moe.capacity import expert_capacity, keep_within_capacity
from xmoe_fairseq.moe.dispatch.local import Dispatcher, LocalDispatcher
from xmoe_fairseq.moe.dispatch.parallel import ExpertParallelDispatcher
from xmoe_fairseq.moe.experts.experts import Experts
from xmoe_fairseq.moe.experts.plain import Activation
from xmoe_fairseq.moe.routers.base import Router
from xmoe_fairseq.moe.routers.hash import HashRouter
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.stats import RoutingStats

COMBINE = ("probs", "ones")


class MoELayer(nn.Module):
    """`y_t = sum_e w[t, e] * FFN_e(x_t)` over the experts that token t chose (arXiv 2403.18926, eq. 1).

    Only the chosen (token, expert) rows are computed. Padding takes no part: not in routing, capacity,
    losses or statistics, and its output is 0.

    The weights w are the router's probabilities. With `combine="ones"` they are 1, and every token gets one
    `output_bias`: parts of a dense FFN then add up to what it computed.

    Args:
        model_dim: width D of a token.
        expert_dim: hidden width F of one expert.
        num_experts: number of experts E.
        router: for D and E.
        capacity_factor: in training an expert keeps at most ceil(T / E * capacity_factor) rows; 0 = all.
        eval_capacity_factor: the same in evaluation.
        min_capacity: an expert may always keep this many rows.
        activation: name, function or module between the two linear maps of an expert; see `Experts`.
        activation_dropout: dropout probability after the activation.
        dense_ffn_dim: width of the FFN that this layer replaces, for counting FLOPs; None = expert_dim.
        name: what error messages call this layer.
        expert_parallel_group: the experts lie in equal slices on the ranks of this group; None = all here.
        combine: "probs", or "ones" for `output_bias_D + sum_e FFN_e(x_t)` over the chosen experts.
    """

    def __init__(
        self,
        model_dim: int,
        expert_dim: int,
        num_experts: int,
        router: Router | HashRouter,
        capacity_factor: float = 0.0,
        eval_capacity_factor: float = 0.0,
        min_capacity: int = 4,
        activation: str | Activation = "relu",
        activation_dropout: float = 0.0,
        dense_ffn_dim: int | None = None,
        name: str = "MoE layer",
        expert_parallel_group: dist.ProcessGroup | None = None,
        combine: str = "probs",
    ) -> None:
        super().__init__()
        given, expected = (router.num_experts, router.model_dim), (num_experts, model_dim)
        if given != expected:
            raise ValueError(f"router must be for (num_experts, model_dim) = {expected}, got {given}")
        _check((capacity_factor, eval_capacity_factor, min_capacity), dense_ffn_dim, combine)
        self.model_dim, self.expert_dim, self.num_experts = model_dim, expert_dim, num_experts
        self.router_flops = router.flops_per_token
        self.router = router
        self.dispatcher: Dispatcher = LocalDispatcher()
        part = (0, 1)
        if expert_parallel_group is not None:
            self.dispatcher = ExpertParallelDispatcher(expert_parallel_group)
            part = (dist.get_rank(expert_parallel_group), dist.get_world_size(expert_parallel_group))
        self.experts = Experts(num_experts, model_dim, expert_dim, activation, activation_dropout, part)
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.dense_ffn_dim = dense_ffn_dim or expert_dim
        self.name = name
        self.output_bias: nn.Parameter | None = None
        if combine == "ones":  # a bias that counts once, whatever is chosen; of the experts' the sum would
            self.output_bias = nn.Parameter(torch.zeros(model_dim))
            nn.init.zeros_(self.experts.fc2_bias)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """
        Args:
            x: (..., D) tokens.
            padding_mask: (...) bool, True = padding; None = no padding.
            token_ids: (...) for a router that goes by them; others pass them over.

        Returns:
            y of x's shape and dtype, and the Routing of the non-padding tokens in row-major order.

        Raises:
            ValueError: shapes or mask type do not fit.
            FloatingPointError: a non-padding token holds NaN or inf.
        """
        if x.shape[-1:] != (self.model_dim,):
            raise ValueError(f"x must be of shape (..., {self.model_dim}), got {tuple(x.shape)}")
        if token_ids is not None and token_ids.shape != x.shape[:-1]:
            raise ValueError(
                f"token_ids must be of shape {tuple(x.shape[:-1])}, got {tuple(token_ids.shape)}"
            )
        if padding_mask is None:
            ids_T = None if token_ids is None else token_ids.reshape(-1)
            y_TD, routing = self.forward_tokens(x.reshape(-1, x.size(-1)), ids_T)
            return y_TD.to(x.dtype).view(x.shape), routing
        if padding_mask.shape != x.shape[:-1] or padding_mask.dtype.is_floating_point:
            raise ValueError(
                f"padding_mask must be bool of shape {tuple(x.shape[:-1])}, "
                f"got {padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
            )
        flat = x.reshape(-1, x.size(-1))
        (real_T,) = (~padding_mask.bool()).reshape(-1).nonzero(as_tuple=True)
        ids_T = None if token_ids is None else token_ids.reshape(-1).index_select(0, real_T)
        y_TD, routing = self.forward_tokens(flat.index_select(0, real_T), ids_T)
        y = torch.zeros_like(flat).index_copy(0, real_T, y_TD.to(x.dtype))
        return y.view(x.shape), routing

    def forward_tokens(self, x_TD: Tensor, ids_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.limit(self.route(x_TD, ids_T))
        if self.output_bias is not None:
            routing = weigh_one(routing, x_TD)
        x_SD, rows, way_back = self.dispatcher.dispatch(x_TD, routing)
        y_TD = self.dispatcher.combine(self.experts(x_SD, rows), way_back)
        return y_TD if self.output_bias is None else y_TD + self.output_bias, routing

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Routing:
        try:
            routing: Routing = self.router(x_TD) if ids_T is None else self.router(x_TD, ids_T)
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: {error}") from None
        return routing

    def limit(self, routing: Routing) -> Routing:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor == 0:
            return routing
        capacity = expert_capacity(routing.num_tokens, routing.num_experts, factor, self.min_capacity)
        return keep_within_capacity(routing, capacity)

    def retain_dropout(self) -> None:
        """Keep the experts' dropout in evaluation, for estimates of a model's uncertainty."""
        for module in self.modules():
            if "dropout_in_evaluation" in vars(module):
                vars(module)["dropout_in_evaluation"] = True

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Of the experts held here."""
        return self.experts.parameters()

    def rows_computed(self, stats: RoutingStats) -> Tensor:
        """Rows that the experts computed in a call with these statistics."""
        return stats.rows_kept

    def extra_repr(self) -> str:
        return (
            f"capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}, "
            f"min_capacity={self.min_capacity}, combine={'probs' if self.output_bias is None else 'ones'}"
        )


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


def _check(capacities: tuple[float, float, float], dense_ffn_dim: int | None, combine: str) -> None:
    """Raises ValueError."""
    if not all(0 <= value < math.inf for value in capacities):
        raise ValueError(  # NaN too
            "capacity_factor, eval_capacity_factor and min_capacity must be 0 or more, and finite, "
            f"got {', '.join(map(str, capacities))}"
        )
    if dense_ffn_dim is not None and dense_ffn_dim < 1:
        raise ValueError(f"dense_ffn_dim must be at least 1, or None, got {dense_ffn_dim}")
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine}")
