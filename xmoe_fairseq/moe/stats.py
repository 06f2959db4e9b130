"""What to log about a routing: sums over tokens first, ratios once everything is added up."""

from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from xmoe_fairseq.moe.routing import Routing, count

Number = TypeVar("Number", int, Tensor)


def load_cv(rows_E: Tensor, active_E: Tensor | None = None) -> Tensor:
    """(...,) coefficient of variation (standard deviation / mean) of the experts' loads (..., E); 0 without
    rows. If n of E experts share all rows equally it is sqrt(E / n - 1).

    Args:
        active_E: bool, (..., E) which of them count; None = all.
    """
    active_E = torch.ones_like(rows_E, dtype=torch.bool) if active_E is None else active_E
    experts = active_E.sum(-1).clamp(min=1)
    mean = rows_E.double().sum(-1) / experts
    off_E = (rows_E - mean.unsqueeze(-1)) * active_E
    return (off_E.square().sum(-1) / experts).sqrt() / mean.clamp(min=1 / experts)


def max_violation(rows_E: Tensor, active_E: Tensor | None = None) -> Tensor:
    """(...,) by how much the largest of the experts' loads (..., E) exceeds their mean, as a share of that: 0
    if even or without rows, E - 1 if one takes all. MaxVio of Wang et al. 2024, arXiv 2408.15664."""
    experts = rows_E.size(-1) if active_E is None else active_E.sum(-1).clamp(min=1)
    mean = rows_E.double().sum(-1) / experts
    return (rows_E.amax(-1) - mean) / mean.clamp(min=1 / experts)


@dataclass(frozen=True)
class RoutingStats:
    """Sums over the non-padding tokens of one layer; the ratios are properties, to be taken last.

    Sums add up over micro-batches, ranks and the batches of a validation, so the ratios of the total are
    those of all tokens, however they were cut. The mean of each part's ratio is not: two tokens cannot load
    32 experts evenly.

    float64 on the tokens' device, () or (E,); of L layers stacked (L,) or (L, E). Probabilities and first
    choices are of cheap experts too, which come last. Taking them does not make the device wait for the host.
    """

    tokens: Tensor
    rows_wanted: Tensor  # (token, expert) pairs that the router chose
    rows_kept_E: Tensor  # of these, pairs that each expert computed
    offered_E: Tensor  # tokens for which each expert was in use
    rows_shared: Tensor  # pairs of shared experts, which nobody chose
    rows_cheap: Tensor  # pairs of cheap experts, which are not among those wanted
    probs_E: Tensor  # probability of each expert
    first_choices_E: Tensor  # tokens for which it is the most probable
    entropy: Tensor  # nats, of the router's distribution
    z: Tensor  # squared log-partition

    @classmethod
    def of(cls, routing: Routing) -> "RoutingStats":
        probs_TE, rows_E = routing.probs_TE.detach(), routing.rows_per_expert()
        tiny = torch.finfo(probs_TE.dtype).tiny

        def number(value: float) -> Tensor:  # not new_tensor, for whose copy a GPU would wait
            return probs_TE.new_full((), value, dtype=torch.float64)

        offered_E = torch.full_like(rows_E, routing.num_tokens, dtype=torch.float64)
        return cls(
            tokens=number(routing.num_tokens),
            rows_wanted=number(routing.rows_wanted),
            rows_kept_E=rows_E.double(),
            offered_E=offered_E if routing.active_E is None else offered_E * routing.active_E,
            rows_shared=number(routing.num_tokens * routing.shared_experts),
            rows_cheap=number(routing.rows_cheap),
            probs_E=probs_TE.sum(dim=0).double(),
            first_choices_E=count(probs_TE.argmax(dim=1), probs_TE.size(1)).double(),
            # Not torch.special.entr, which takes twice as long.
            entropy=-(probs_TE * probs_TE.clamp(min=tiny).log()).sum().double(),
            z=routing.z_loss.detach().double() * routing.num_tokens,
        )

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device, num_cheap: int = 0) -> "RoutingStats":
        """Of no tokens."""
        shapes = {f.name: num_experts + num_cheap if f.name.endswith("_E") else () for f in fields(cls)}
        shapes |= {"rows_kept_E": num_experts, "offered_E": num_experts}
        return cls(**{n: torch.zeros(s, dtype=torch.float64, device=device) for n, s in shapes.items()})

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        return RoutingStats(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    @property
    def rows_kept(self) -> Tensor:
        return self.rows_kept_E.sum(-1)

    @property
    def rows_computed(self) -> Tensor:
        return self.rows_kept + self.rows_shared

    @property
    def load_cv(self) -> Tensor:
        return load_cv(self.rows_kept_E, self.active_E)

    @property
    def max_violation(self) -> Tensor:
        return max_violation(self.rows_kept_E, self.active_E)

    @property
    def active_E(self) -> Tensor:
        """Bool, which were in use."""
        return self.offered_E > 0

    @property
    def dead_E(self) -> Tensor:
        """Bool, which of those in use computed nothing."""
        return self.active_E & (self.rows_kept_E == 0)

    @property
    def dead_experts(self) -> Tensor:
        return self.dead_E.sum(-1)

    @property
    def load_balance_loss(self) -> Tensor:
        """Switch's, as in losses.py, of any router; NaN without tokens."""
        products_E = self.probs_E * self.first_choices_E
        experts = products_E.size(-1) - (~self.active_E).sum(-1)
        return experts * products_E.sum(-1) / self.tokens.square()

    @property
    def z_loss(self) -> Tensor:
        """Mean over tokens; NaN without."""
        return self.z / self.tokens


class RowCounts(NamedTuple):
    """Of one call, what FLOPs are counted from: numbers that the host knows, so a GPU is not waited for."""

    tokens: int
    rows_computed: int  # shared experts' included
    rows_shared: int

    @classmethod
    def of(cls, routing: Routing) -> "RowCounts":
        shared = routing.num_tokens * routing.shared_experts
        return cls(routing.num_tokens, routing.token_R.numel() + shared, shared)


def ffn_flops(rows: Number, model_dim: int, inner_dim: int) -> Number:
    """Of both linear maps on so many rows, an expert's or a dense FFN's: multiply-adds x 2, forward."""
    return rows * (4 * model_dim * inner_dim)


def ffn_parameters(model_dim: int, inner_dim: int) -> int:
    """Of an expert or a dense FFN: two linear maps and their biases."""
    return 2 * model_dim * inner_dim + inner_dim + model_dim
