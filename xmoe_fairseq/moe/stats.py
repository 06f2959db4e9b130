"""What to log about a routing: sums, so that they add up over layers, batches and ranks."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from xmoe_fairseq.moe.routing import Routing


def load_cv(rows_per_expert: Tensor) -> Tensor:
    """Coefficient of variation (standard deviation / mean) of the experts' loads; 0 without rows."""
    rows_E = rows_per_expert.double()
    return rows_E.std(correction=0) / rows_E.mean().clamp(min=1 / rows_E.numel())


@dataclass(frozen=True)
class RoutingStats:
    """Sums over tokens, or over (layer, batch) calls where it says so.

    0-dim float64 tensors on the tokens' device; taking them does not make the device wait for the host.
    """

    calls: Tensor  # MoE layer calls that had at least one token
    tokens: Tensor  # non-padding tokens
    rows_wanted: Tensor  # (token, expert) pairs that the router chose
    rows_kept: Tensor  # of these, pairs that were computed
    load_cv: Tensor  # per call: variation of the experts' computed rows
    entropy: Tensor  # nats, of the router's distribution
    load_balance_loss: Tensor  # per call, unscaled
    z_loss: Tensor  # per call, unscaled

    @classmethod
    def of(cls, routing: Routing) -> "RoutingStats":
        probs_TE = routing.probs_TE.detach()

        def number(value: float) -> Tensor:  # not new_tensor, for whose copy a GPU would wait
            return probs_TE.new_full((), value)

        sums = {
            "calls": number(float(routing.num_tokens > 0)),
            "tokens": number(float(routing.num_tokens)),
            "rows_wanted": number(float(routing.rows_wanted)),
            "rows_kept": number(float(routing.token_R.numel())),
            "load_cv": load_cv(routing.rows_per_expert()),
            "entropy": torch.special.entr(probs_TE).sum(),
            "load_balance_loss": routing.load_balance_loss.detach(),
            "z_loss": routing.z_loss.detach(),
        }
        return cls(**{name: value.double() for name, value in sums.items()})

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        mine, theirs = asdict(self), asdict(other)
        return RoutingStats(**{name: mine[name] + theirs[name] for name in mine})
