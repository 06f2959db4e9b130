"""What goes to which rank and comes back: layouts worked out by hand, all routers, precisions, host waits."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tolerances import assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe_fairseq.moe import (
    BaseRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    MoELayer,
    ReLURouter,
    SeqTopKRouter,
    ThresholdRouter,
    TokenRouter,
    TopAnyRouter,
    TopKRouter,
)
from xmoe_fairseq.moe.dispatch.ranks import pairs_by_expert, rows_by_rank

SIZES = MODEL_DIM, NUM_EXPERTS = 8, 6
TOKENS = [5, 0, 9]  # of each rank
ROUTERS: dict[str, Callable[[], TokenRouter]] = {
    "threshold": partial(ThresholdRouter, *SIZES, 0.6),
    "all experts": partial(ThresholdRouter, *SIZES, 1.0),
    "probability": partial(ThresholdRouter, *SIZES, 0.2, rule="probability"),
    "topk": partial(TopKRouter, *SIZES, 3),
    "seq_topk": partial(SeqTopKRouter, *SIZES, 2),
    "relu": partial(ReLURouter, *SIZES),
    "topany": partial(TopAnyRouter, *SIZES),
    "base": partial(BaseRouter, *SIZES),
    "expert_choice": partial(ExpertChoiceRouter, *SIZES, 2),
    "expert_threshold": partial(ExpertThresholdRouter, *SIZES, 2),
    "hash": lambda: HashRouter(*SIZES, torch.arange(20) % NUM_EXPERTS),
}


def test_a_row_goes_once_to_each_rank() -> None:
    """Tokens 3, 0 and 3 again to experts of rank 0, nothing to rank 1, 2 and 3 to rank 2."""
    rows = rows_by_rank(torch.tensor([3, 0, 3, 2, 3]), torch.tensor([3, 0, 2]), num_tokens=4)
    assert rows.counts_N.tolist() == [2, 0, 2]
    assert rows.token_B[:4].tolist() == [0, 3, 2, 3]
    assert rows.row_R.tolist() == [1, 0, 1, 0, 1]
    assert rows.token_B.numel() == 5  # no more than there are pairs
    assert rows_by_rank(torch.zeros(9).long(), torch.tensor([4, 5]), 1).token_B.tolist() == [0, 0]


def test_rows_of_nothing() -> None:
    for num_tokens in (0, 3):
        rows = rows_by_rank(torch.empty(0).long(), torch.zeros(2).long(), num_tokens)
        assert (rows.token_B.numel(), rows.row_R.numel(), rows.counts_N.tolist()) == (0, 0, [0, 0])
    order_P, first_P = pairs_by_expert(torch.zeros(2).long(), torch.zeros(2, 3).long(), 0)
    assert order_P.numel() == first_P.numel() == 0


def test_pairs_that_arrived_by_rank_are_laid_out_by_expert() -> None:
    """Of rank 0 pairs of experts 0, 0, 2 on 2 rows, of rank 1 none, of rank 2 of experts 0, 1, 2 on 3."""
    pairs_NE = torch.tensor([[2, 0, 1], [0, 0, 0], [1, 1, 1]])
    order_P, first_P = pairs_by_expert(torch.tensor([2, 0, 3]), pairs_NE, 6)
    assert order_P.tolist() == [0, 1, 3, 4, 2, 5]
    assert first_P.tolist() == [0, 0, 2, 2, 0, 2]


def of_rank(rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens, and their ids (or sentences)."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(TOKENS[rank], MODEL_DIM, generator=generator).to(dtype)
    return x_TD.requires_grad_(), torch.arange(TOKENS[rank]) // 2


def run_layer(
    group: Any, make: Callable[[Any], MoELayer], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    torch.manual_seed(3)
    moe, (x_TD, ids_T) = make(group).to(dtype), of_rank(rank, dtype)
    y_TD, routing = moe(x_TD, token_ids=ids_T)
    (y_TD.float().sin().sum() * (1.0 + rank) + routing.load_balance_loss + routing.z_loss).backward()
    found = {"y": y_TD.detach(), "x.grad": x_TD.grad}
    return found | {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}


def compare_apart(
    make: Callable[[Any], MoELayer], dtype: torch.dtype = torch.float32, terms: int = 256
) -> None:
    """Each rank's tokens are as in a layer that has all experts; of those gradients add up."""
    results = run_ranks(len(TOKENS), lambda: run_layer(dist.group.WORLD, make, dist.get_rank(), dtype))
    alone = [run_layer(None, make, rank, dtype) for rank in range(len(TOKENS))]
    for mine, theirs in zip(results, alone, strict=True):
        for name in ("y", "x.grad"):
            assert mine[name].dtype == dtype
            assert_same(mine.pop(name), theirs.pop(name), scale=1.0, terms=terms)
    sums = {name: sum(each[name].double() for each in alone) for name in alone[0]}
    for name, expected in sums.items():
        parts = [result[name].double() for result in results]
        whole = torch.cat(parts) if name.startswith("experts.") else sum(parts)
        assert_same(whole, expected, scale=1.0, dtype=dtype, terms=terms, what=name)


def test_a_gradient_that_one_rank_alone_wants() -> None:
    """All take part in the exchange, or it would wait for them."""

    def ranks() -> bool:
        torch.manual_seed(3)
        layer = MoELayer(8, 5, 6, TopKRouter(*SIZES, 3), expert_parallel_group=dist.group.WORLD)
        layer.requires_grad_(False)
        x_TD = torch.randn(4, MODEL_DIM, requires_grad=dist.get_rank() == 1)
        layer(x_TD)[0].sum().backward()
        return x_TD.grad is not None

    assert run_ranks(3, ranks) == [False, True, False]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_sends_what_it_chose(router: str) -> None:
    compare_apart(lambda group: MoELayer(8, 5, 6, ROUTERS[router](), expert_parallel_group=group))


def test_a_capacity_is_of_each_ranks_own_tokens() -> None:
    def make(group: Any) -> MoELayer:
        limits = {"capacity_factor": 1.0, "min_capacity": 1}
        return MoELayer(8, 5, 6, TopKRouter(*SIZES, 3), **limits, expert_parallel_group=group)

    compare_apart(make)


@pytest.mark.parametrize("combine", ["probs", "ones"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_one_rounding_for_each_rank(dtype: torch.dtype, combine: str) -> None:
    """Rows and sums travel as the model's numbers are, and are added in fp32."""

    def make(group: Any) -> MoELayer:
        return MoELayer(8, 5, 6, TopKRouter(*SIZES, 4), combine=combine, expert_parallel_group=group)

    compare_apart(make, dtype, terms=1)


@pytest.mark.parametrize("combine", ["probs", "ones"])
def test_evaluation_sends_the_same(combine: str) -> None:
    def evaluate(group: Any, rank: int) -> Tensor:
        torch.manual_seed(3)
        moe = MoELayer(8, 5, 6, ThresholdRouter(*SIZES, 0.6), combine=combine, expert_parallel_group=group)
        with torch.no_grad():
            return moe.eval()(of_rank(rank)[0])[0]

    results = run_ranks(len(TOKENS), lambda: evaluate(dist.group.WORLD, dist.get_rank()))
    for rank, y_TD in enumerate(results):
        assert_same(y_TD, evaluate(None, rank), scale=1.0)


class HostWaits(TorchDispatchMode):
    """Counts what a GPU's host would wait for."""

    waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        sizeless = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        self.waits += sizeless or name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::bincount")
        return function(*args, **(kwargs or {}))

    def tolist(self, tensor: Tensor) -> Any:
        self.waits += 1
        return tensor.numpy(force=True).tolist()


def test_the_host_waits_once_and_not_in_the_backward_pass() -> None:
    def ranks() -> list[int]:
        moe = MoELayer(8, 5, 6, TopKRouter(*SIZES, 3), expert_parallel_group=dist.group.WORLD)
        x_TD = of_rank(dist.get_rank())[0]
        routing, counted = moe.router(x_TD), HostWaits()
        with counted, patch.object(Tensor, "tolist", lambda tensor: counted.tolist(tensor)):
            x_SD, rows, sent = moe.dispatcher.dispatch(x_TD, routing)
            waits = [counted.waits]
            y_SD = rows.weighted_sum(x_SD.index_select(0, rows.source_R), x_SD.size(0))
            y_TD = moe.dispatcher.combine(y_SD, sent)
            waits.append(counted.waits)
            y_TD.sum().backward()
        return [*waits, counted.waits]

    assert run_ranks(3, ranks) == [[1, 1, 1]] * 3
