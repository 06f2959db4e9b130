"""Routers: (T, D) tokens -> Routing.

Most are a `Router`: it scores every expert for every token, then a subclass says which experts a token takes.
Arithmetic is fp32 at least, with autocast off: in bf16 two experts easily tie, and the running
mass of the threshold router would be wrong in its second digit.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xmoe_fairseq.moe.balance import STEP, LossFreeBias, balance_named
from xmoe_fairseq.moe.expert_order import expert_order, of_rows
from xmoe_fairseq.moe.finite import check_scores, may_overflow
from xmoe_fairseq.moe.losses import load_balance_loss, weigh_cheap, z_loss
from xmoe_fairseq.moe.native.routing import Chosen
from xmoe_fairseq.moe.recompute import first_scores
from xmoe_fairseq.moe.routers.balance_flags import BALANCE
from xmoe_fairseq.moe.routers.registry import Flag, RouterKind
from xmoe_fairseq.moe.routers.scores import HiddenLayer, exact_linear
from xmoe_fairseq.moe.routing import Routing, count


class TokenRouter(RouterKind, nn.Module):
    """What an `MoELayer` needs of a router.

    Args:
        model_dim: width D of a token.
        num_experts: number of experts E.
        flops_per_token: multiply-adds x 2.
    """

    def __init__(self, model_dim: int, num_experts: int, flops_per_token: int) -> None:
        super().__init__()
        if model_dim < 1 or num_experts < 1:
            given = f"{model_dim} and {num_experts}"
            raise ValueError(f"model_dim and num_experts must be at least 1, got {given}")
        self.model_dim, self.num_experts = model_dim, num_experts
        self.flops_per_token = flops_per_token

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        """Route T non-padding tokens, by what they are or by their ids."""
        raise NotImplementedError

    def to_log(self) -> dict[str, Tensor | float]:
        """What is worth a record beside the statistics of the routing."""
        return {}

    def extra_repr(self) -> str:
        return f"model_dim={self.model_dim}, num_experts={self.num_experts}"


class Router(TokenRouter):
    """Linear scores without a bias, softmax, and a choice that a subclass makes.

    Linear in the token or, after `score_by_hidden`, in a hidden layer of it.
    """

    temperature = 1.0  # divides the scores: below 1 a router is more decisive
    deciding: ClassVar[tuple[str, ...]] = ()  # methods by which `choose` goes
    has_own_loss: ClassVar[bool] = False  # that no balance may take the place of
    flags: ClassVar[tuple[Flag, ...]] = BALANCE

    def __init__(self, model_dim: int, num_experts: int) -> None:
        super().__init__(model_dim, num_experts, 2 * model_dim * num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, model_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear
        self.hidden: HiddenLayer | None = None
        self.balance_by("first")

    def score_by_hidden(self, width: int) -> None:
        """Let the scores be linear in so many units of a hidden layer, no longer in the token.

        Raises:
            ValueError: the width is below 1; the class has scores of its own.
        """
        if width < 1 or type(self).score is not Router.score:
            raise ValueError(f"{type(self).__name__} cannot score by a hidden layer of width {width}")
        self.hidden = HiddenLayer(self.model_dim, width)
        self.weight = nn.Parameter(self.weight.new_empty(self.num_experts, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.flops_per_token = 2 * width * (self.model_dim + self.num_experts)

    def balance_by(self, name: str, step: float = STEP) -> None:
        """See `balance.py`; `first` is this class's own `balance`, the step is u of `bias`.

        Raises:
            ValueError: no balance is named so, or may stand here; the step is not above 0.
        """
        if name != "first" and self.has_own_loss:
            kind = type(self).__name__
            raise ValueError(f"balance must be first with {kind}, whose loss is its own, got {name}")
        self.balancing = balance_named(name, self.num_experts, step)

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        """
        Raises:
            FloatingPointError: a token holds NaN or inf (or its scores overflow). Not on a GPU, where
                `check_finite` tells; nor where a loss scaler will see to it (`may_overflow`).
        """
        may_hold_nan = may_overflow(self, x_TD)  # asks for autocast
        device = x_TD.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            logits_TE = first_scores(self.score(x_TD))
            finite = None if may_hold_nan else check_scores(x_TD, logits_TE)
            chosen = self.chosen(logits_TE)
            return Routing(
                token_R=chosen.token_R,
                expert_R=chosen.expert_R,
                rank_R=chosen.rank_R,
                weight_R=chosen.weight_R,
                probs_TE=chosen.probs_TE,
                rows_wanted=chosen.token_R.numel(),
                load_balance_of=self.balance_of(chosen),
                z_loss_of=partial(z_loss, logits_TE),
                in_order=None if chosen.counts_E is None else (chosen.expert_R, chosen.counts_E),
                finite=finite,
            )

    def chosen(self, logits_TE: Tensor) -> Chosen:
        """By the scores, with the bias of a balance if there is one; weights are without."""
        bias = self.balancing
        if not isinstance(bias, LossFreeBias):
            return self.choose_natively(logits_TE) or self.choose_plainly(logits_TE)
        biased_TE = logits_TE.detach() + bias.bias_E
        chosen = self.choose_natively(biased_TE) or self.choose_plainly(biased_TE)
        probs_TE = torch.softmax(logits_TE, dim=-1)
        weight_TE = self.combine_weight(logits_TE, probs_TE)
        weight_R = of_rows(weight_TE, chosen.token_R, chosen.expert_R)
        return chosen._replace(probs_TE=probs_TE, weight_R=weight_R)

    def balance_of(self, chosen: Chosen) -> Callable[[], Tensor]:
        """The auxiliary loss, to be worked out when it is asked for; what is steered counts the rows now."""
        probs_TE = weigh_cheap(chosen.probs_TE, self.num_cheap, self.cheap_balance)
        if self.balancing is None:
            return partial(self.balance, probs_TE, chosen.first_T)
        counts_E = chosen.counts_E
        rows_E = count(chosen.expert_R, self.num_experts) if counts_E is None else counts_E
        if self.training and self.counting:
            self.balancing.count(rows_E)
        return partial(self.balancing.loss, probs_TE, rows_E)

    def choose_natively(self, logits_TE: Tensor) -> Chosen | None:
        """The same in C++, for a router that goes by probabilities alone; None = it cannot."""
        return None

    def choose_plainly(self, logits_TE: Tensor) -> Chosen:
        probs_TE = torch.softmax(logits_TE, dim=-1)
        expert_TK, chosen_TK = self.choose(logits_TE.detach(), probs_TE.detach())
        rows = expert_order(expert_TK, chosen_TK, self.num_experts)
        weight_R = of_rows(self.combine_weight(logits_TE, probs_TE), rows.token_R, rows.expert_R)
        return Chosen(probs_TE, weight_R, *rows[:3], expert_TK[:, 0], rows.counts_E)

    def chooses_as(self, kind: type["Router"]) -> bool:
        """Whether the class is `kind`, or has from it all that decides about a token's experts."""
        decide = ("choose", "combine_weight", *kind.deciding)
        return all(getattr(type(self), name) is getattr(kind, name) for name in decide)

    def score(self, x_TD: Tensor) -> Tensor:
        logits_TE = exact_linear(x_TD if self.hidden is None else self.hidden(x_TD), self.weight)
        return logits_TE if self.temperature == 1.0 else logits_TE / self.temperature

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Distinct expert ids (T, K) in order of preference, and which of them a token takes: (T, K) bool, or
        None for all, so that a GPU's host need not wait for their number."""
        raise NotImplementedError

    def combine_weight(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """(T, E) weight of each expert's output: the plain probability, not renormalised."""
        return probs_TE

    def balance(self, probs_TE: Tensor, first_choice_T: Tensor) -> Tensor:
        """The auxiliary loss; 0 for a router that needs none."""
        if not self.needs_balance_loss:
            return probs_TE.sum() * 0.0
        return load_balance_loss(probs_TE, first_choice_T)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The checkpoint of a model that was trained with a budget may be used with a fixed t or k; and what
        a loss has gone by may be left out, but not a bias, without which tokens would choose otherwise."""
        for steered in {"budget.threshold", "balancing.share_E"} - dict(self.named_buffers()).keys():
            for name in [name for name in state_dict if name.startswith(prefix + steered)]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


FEW = 1024  # probabilities that are sorted sooner than packed (docs/performance.md, Tried)


def by_preference(probs_TE: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The `limit` largest probabilities, descending, and their experts; of equals the lower id first."""
    num_experts = probs_TE.size(1)
    if probs_TE.dtype != torch.float32 or probs_TE.numel() <= FEW:
        sorted_TE, expert_TE = torch.sort(probs_TE, dim=1, descending=True, stable=True)
        return sorted_TE[:, :limit], expert_TE[:, :limit]
    # A stable sort of all experts takes twice as long as the top few of distinct integers: the bits of a
    # probability, which order as it does, above E - 1 - id.
    last_id_first_E = torch.arange(num_experts - 1, -1, -1, device=probs_TE.device)
    key_TE = torch.add(last_id_first_E, probs_TE.view(torch.int32).long(), alpha=1 << 32)
    key_TK = key_TE.topk(limit).values if limit < num_experts else key_TE.sort(descending=True).values
    # Of the two words of an integer the lower comes first, wherever torch runs.
    return key_TK.view(torch.float32)[:, 1::2], num_experts - 1 - (key_TK & 0xFFFFFFFF)
