"""What to log about a routing: sums over tokens first, ratios once everything is added up."""

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from xmoe_fairseq.moe.routing import Routing, count

Number = TypeVar("Number", int, Tensor)


def load_cv(rows_E: Tensor) -> Tensor:
    """(...,) coefficient of variation (standard deviation / mean) of the experts' loads (..., E); 0 without
    rows. If n of E experts share all rows equally it is sqrt(E / n - 1)."""
    rows_E = rows_E.double()
    return rows_E.std(-1, correction=0) / rows_E.mean(-1).clamp(min=1 / rows_E.size(-1))


def max_violation(rows_E: Tensor) -> Tensor:
    """(...,) by how much the largest of the experts' loads (..., E) exceeds their mean, as a share of that: 0
    if even or without rows, E - 1 if one takes all. MaxVio of Wang et al. 2024, arXiv 2408.15664."""
    mean = rows_E.double().mean(-1)
    return (rows_E.amax(-1) - mean) / mean.clamp(min=1 / rows_E.size(-1))


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
    rows_shared: Tensor  # pairs of shared experts, which nobody chose
    rows_cheap: Tensor  # pairs of cheap experts, which are not among those wanted
    probs_E: Tensor  # probability of each expert
    first_choices_E: Tensor  # tokens for which it is the most probable
    entropy: Tensor  # nats, of the router's distribution
    z: Tensor  # squared log-partition

    @classmethod
    def of(cls, routing: Routing) -> "RoutingStats":
        probs_TE = routing.probs_TE.detach()
        tiny = torch.finfo(probs_TE.dtype).tiny

        def number(value: float) -> Tensor:  # not new_tensor, for whose copy a GPU would wait
            return probs_TE.new_full((), value, dtype=torch.float64)

        return cls(
            tokens=number(routing.num_tokens),
            rows_wanted=number(routing.rows_wanted),
            rows_kept_E=routing.rows_per_expert().double(),
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
        shapes["rows_kept_E"] = num_experts
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
        return load_cv(self.rows_kept_E)

    @property
    def max_violation(self) -> Tensor:
        return max_violation(self.rows_kept_E)

    @property
    def dead_experts(self) -> Tensor:
        """Number of those that computed nothing."""
        return (self.rows_kept_E == 0).sum(-1)

    @property
    def load_balance_loss(self) -> Tensor:
        """Switch's, as in losses.py, of any router; NaN without tokens."""
        products_E = self.probs_E * self.first_choices_E
        return products_E.size(-1) * products_E.sum(-1) / self.tokens.square()

    @property
    def z_loss(self) -> Tensor:
        """Mean over tokens; NaN without."""
        return self.z / self.tokens


def ffn_flops(rows: Number, model_dim: int, inner_dim: int) -> Number:
    """Of both linear maps on so many rows, an expert's or a dense FFN's: multiply-adds x 2, forward."""
    return rows * (4 * model_dim * inner_dim)


def ffn_parameters(model_dim: int, inner_dim: int) -> int:
    """Of an expert or a dense FFN: two linear maps and their biases."""
    return 2 * model_dim * inner_dim + inner_dim + model_dim
