"""Hash layers: the expert of a token is fixed by its id. For comparison."""

import heapq
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xmoe_fairseq.moe.expert_order import expert_order
from xmoe_fairseq.moe.finite import can_read, check_scores, may_overflow
from xmoe_fairseq.moe.routers.base import TokenRouter
from xmoe_fairseq.moe.routers.registry import Flag, Place, register_router
from xmoe_fairseq.moe.routing import Routing


@register_router("hash")
class HashRouter(TokenRouter):
    """One expert per token, looked up by the token's id; weight 1, nothing to learn, no auxiliary loss.

    The id is that of the input token, so it is known in time and the same in any batch. The table is a
    buffer: a checkpoint brings its own. Roller et al. 2021, arXiv 2106.04426.

    Args:
        model_dim: width D of a token.
        num_experts: number of experts E.
        table_V: the expert of each of V token ids; see `random_table` and `balanced_table`.
    """

    description = "one, fixed by the input token's id; weight 1, nothing to learn (Hash layers)"
    needs_balance_loss = False
    goes_by_ids = True
    flags = (
        Flag(
            "moe_hash_table", "balanced", "balanced (frequent tokens to the least loaded expert, by the "
            "dictionary's counts) or random",
            rule="must be one of balanced, random",
            holds=lambda config: config.moe_hash_table in ("balanced", "random"),
        ),
    )  # fmt: skip

    def __init__(self, model_dim: int, num_experts: int, table_V: Tensor) -> None:
        super().__init__(model_dim, num_experts, flops_per_token=0)
        if table_V.numel() == 0 or not 0 <= int(table_V.min()) <= int(table_V.max()) < num_experts:
            raise ValueError(f"table_V must hold expert ids from 0 to {num_experts - 1}")
        self.table_V: Tensor
        self.register_buffer("table_V", table_V.long())

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float]:
        return "", 1

    @classmethod
    def from_config(cls, place: Place) -> "HashRouter":
        if place.config.moe_hash_table == "random":
            table_V = random_table(len(place.dictionary), place.num_experts)
        else:
            table_V = balanced_table(place.dictionary.count, place.num_experts)
        return cls(place.model_dim, place.num_experts, table_V=table_V)

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        """
        Raises:
            ValueError: without ids, or with one that is not in the table.
            FloatingPointError: a token holds NaN or inf.
        """
        if ids_T is None:
            raise ValueError("a hash router needs the tokens' ids: call the layer with token_ids")
        if ids_T.numel() and can_read(ids_T):  # on a GPU index_select stops the program
            first, last = int(ids_T.min()), int(ids_T.max())
            if not 0 <= first <= last < self.table_V.numel():
                rule = f"must be from 0 to {self.table_V.numel() - 1}"
                raise ValueError(f"token_ids {rule}, got {first} to {last}")
        finite = None if may_overflow(self, x_TD) else check_scores(x_TD, x_TD)
        expert_T = self.table_V.index_select(0, ids_T)
        rows = expert_order(expert_T.unsqueeze(1), None, self.num_experts)
        dtype, sizes = torch.promote_types(x_TD.dtype, torch.float32), (expert_T.numel(), self.num_experts)
        nothing = partial(x_TD.new_zeros, (), dtype=dtype)
        return Routing(
            token_R=rows.token_R,
            expert_R=rows.expert_R,
            rank_R=rows.rank_R,
            weight_R=torch.ones_like(expert_T, dtype=dtype),
            probs_TE=x_TD.new_zeros(sizes, dtype=dtype).scatter_(1, expert_T.unsqueeze(1), 1.0),
            rows_wanted=expert_T.numel(),
            load_balance_of=nothing,
            z_loss_of=nothing,
            in_order=(rows.expert_R, rows.counts_E),
            finite=finite,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ids={self.table_V.numel()}"


def random_table(num_ids: int, num_experts: int) -> Tensor:
    """Every id to an expert drawn at random, from torch's seed."""
    return torch.randint(num_experts, (num_ids,), device="cpu")


def balanced_table(counts: Sequence[int], num_experts: int) -> Tensor:
    """The most frequent id first, each to the expert with the smallest load so far (section 3.2 there).

    Args:
        counts: how often each id occurs in the training text.
    """
    loads = [(0, expert) for expert in range(num_experts)]  # a heap; of equals the lower expert
    table_V = [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda i: -counts[i]):
        load, expert = loads[0]
        table_V[token] = expert
        heapq.heapreplace(loads, (load + counts[token], expert))
    return torch.tensor(table_V, dtype=torch.long)
