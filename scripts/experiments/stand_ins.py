"""What runs a model on torch's meta device as a GPU would run it, where there are no numbers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gpu_check.budgets import as_on_a_gpu
from xmoe_fairseq.moe import MoELayer, Router, Routing, use_kernel
from xmoe_fairseq.moe.cheap import CheapExperts
from xmoe_fairseq.moe.expert_order import of_rows
from xmoe_fairseq.moe.experts.products import Groups
from xmoe_fairseq.moe.losses import load_balance_loss, z_loss

aten = torch.ops.aten


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """As on a GPU: no scores are kept. (On the meta device torch would take the plain way.)"""
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.size(2))
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout, causal)[0]  # type: ignore


def drop_out(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As on a GPU: a mask of bytes is kept."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def multiply(a: Tensor, b: Tensor, groups: Groups) -> Tensor:
    """As many FLOPs as all experts have, who share the rows: by a product that nothing else takes."""
    right = b[0] if b.dim() == 3 else b
    made = torch.baddbmm(a.new_empty(1, 1, 1), a.unsqueeze(0), right.unsqueeze(0))[0]
    return made if b.dim() == 3 else made.new_empty(groups.ends_E.numel(), *made.shape)


def take_evenly(per_token: float, layer: MoELayer, x_TD: Tensor, ids_T: Tensor | None) -> Routing:
    """In the place of `MoELayer.route`: so many rows, whose experts and tokens are not known."""
    router, num_tokens = layer.router, x_TD.size(0)
    rows = round(per_token * num_tokens)
    scores = router.score if isinstance(router, Router) else _no_scores(router.num_experts)
    logits_TE = scores(x_TD)
    probs_TE = torch.softmax(logits_TE, dim=-1)
    token_R, expert_R, rank_R = (x_TD.new_zeros(rows, dtype=torch.long) for _ in range(3))
    return Routing(
        token_R=token_R, expert_R=expert_R, rank_R=rank_R, weight_R=of_rows(probs_TE, token_R, expert_R),
        probs_TE=probs_TE, rows_wanted=rows,
        load_balance_of=partial(load_balance_loss, probs_TE, token_R.new_zeros(num_tokens)),
        z_loss_of=partial(z_loss, logits_TE),
        in_order=(expert_R, token_R.new_zeros(layer.experts.fc1_weight.size(0))),  # those held here
        num_cheap=layer.num_cheap,
    )  # fmt: skip


def _no_scores(num_experts: int) -> Any:
    return lambda x_TD: x_TD.new_zeros(x_TD.size(0), num_experts, dtype=torch.float32)


def leave_cheap(cheap: CheapExperts, routing: Routing) -> tuple[Routing, Tensor]:
    return routing, routing.probs_TE[:, routing.num_experts :]


@contextmanager
def without_numbers(per_token: float) -> Iterator[None]:
    """What the meta device lacks, and what would depend on numbers."""
    with ExitStack() as stack:
        for place, stand_in in {
            "torch.autocast": lambda *_, **__: nullcontext(),  # it knows no such device
            "torch.is_autocast_enabled": lambda *_: False,
            "torch.nn.functional.scaled_dot_product_attention": attend,
            "torch.nn.functional.dropout": drop_out,
            "xmoe_fairseq.moe.experts.products.lacks": lambda _: "",  # then nobody asks for counts
            "xmoe_fairseq.moe.experts.grouped.product": multiply,
            "xmoe_fairseq.moe.experts.grouped._keep": lambda inner_RF, dropout, _: (
                torch.empty_like(inner_RF, dtype=torch.bool) if dropout else None
            ),
        }.items():
            stack.enter_context(patch(place, stand_in))
        route = partial(take_evenly, per_token)
        stack.enter_context(patch.object(MoELayer, "route", lambda self, x, ids: route(self, x, ids)))
        stack.enter_context(patch.object(MoELayer, "limit", lambda self, routing: routing))
        stack.enter_context(patch.object(CheapExperts, "take_out", leave_cheap))
        stack.enter_context(as_on_a_gpu())
        stack.enter_context(use_kernel("grouped"))
        yield
