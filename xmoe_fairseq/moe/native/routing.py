"""Softmax and the choice of routers that go by probabilities alone, in C++: straight into order of expert."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmoe_fairseq.moe.experts.kernels import PLAIN, forced_kernel
from xmoe_fairseq.moe.native import is_differentiated, missing
from xmoe_fairseq.moe.rules import RULES, rule_named


class Chosen(NamedTuple):
    """R rows, as a `Routing` has them."""

    probs_TE: Tensor  # differentiable, as
    weight_R: Tensor  # that of each row
    token_R: Tensor
    expert_R: Tensor
    rank_R: Tensor  # 0 = the token's first choice
    first_T: Tensor  # each token's first choice
    counts_E: Tensor | None = None  # rows of each expert; None = they are not in order of expert


def can_choose(logits_TE: Tensor) -> bool:
    """Whether `choose_experts` takes them. In compiled code it does not: it would have to look for a file.

    Nor in the block of `use_kernel("plain")`, where nothing is native.
    """
    return (
        not torch.compiler.is_compiling()
        and forced_kernel() != PLAIN
        and type(logits_TE) is Tensor
        and logits_TE.is_cpu
        and logits_TE.dtype in (torch.float32, torch.float64)
        and not missing()
    )


def choose_experts(
    logits_TE: Tensor,
    limit: int,
    threshold: float | Tensor = 1.0,
    counts_C: Tensor | None = None,
    rule: str = "mass",
) -> Chosen:
    """A token takes its most probable experts, of equals the lower id first, while a rule lets it.

    One at least, `limit` at most: `limit=k` alone is top-k. Rows come in order of expert, and within an
    expert of token. For what `can_choose`.

    Args:
        logits_TE: scores, finite unless a loss scaler will see to it.
        limit: in [1, E].
        threshold: t in [0, 1], of the rule.
        counts_C: of a `Budget` (see its `count`), to which what t allows and might have allowed is added.
        rule: of `rules.py`.
    """
    cut, number = float(rule_named(rule).cut(threshold)), list(RULES).index(rule)
    arguments = logits_TE, limit, cut, counts_C, number
    if not is_differentiated(logits_TE):
        return _choose(*arguments)
    return Chosen(*_Choose.apply(*arguments))  # type: ignore[no-untyped-call]


def _choose(logits_TE: Tensor, limit: int, cut: float, counts_C: Tensor | None, rule: int) -> Chosen:
    probs_TE = torch.softmax(logits_TE, dim=1)
    token_R, expert_R, rank_R, weight_R, counts_E, first_T = torch.ops.xmoe.route(
        probs_TE, cut, limit, counts_C, rule
    )
    return Chosen(probs_TE, weight_R, token_R, expert_R, rank_R, first_T, counts_E)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        chosen = _choose(*arguments)
        ctx.save_for_backward(chosen.probs_TE, chosen.token_R, chosen.expert_R)
        ctx.mark_non_differentiable(*chosen[2:])
        ctx.set_materialize_grads(False)
        return tuple(chosen)

    @staticmethod
    def backward(
        ctx: Any, grad_probs_TE: Tensor | None, grad_weight_R: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        probs_TE, token_R, expert_R = ctx.saved_tensors
        if grad_probs_TE is None and grad_weight_R is None:
            return None, None, None, None, None
        if not torch.is_grad_enabled():
            grad_TE = torch.ops.xmoe.route_backward(grad_probs_TE, grad_weight_R, probs_TE, token_R, expert_R)
            return grad_TE, None, None, None, None
        grad_TE = torch.zeros_like(probs_TE) if grad_probs_TE is None else grad_probs_TE
        if grad_weight_R is not None:
            grad_TE = grad_TE.index_put((token_R, expert_R), grad_weight_R, accumulate=True)
        return probs_TE * (grad_TE - (grad_TE * probs_TE).sum(1, keepdim=True)), None, None, None, None
