"""An MoE layer whose experts lie on several ranks equals one layer with all tokens, gradients too."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tolerances import assert_same
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xmoe_fairseq.moe import CheapExperts, MoELayer, Router, ThresholdRouter, TopKRouter, keep_scores
from xmoe_fairseq.moe.dispatch.all_to_all import Sizes, exchange_rows

MODEL_DIM, NUM_EXPERTS = 8, 8
TOKENS = {
    "even": [5, 5, 5, 5],
    "uneven": [7, 1, 3, 10],
    "some ranks without tokens": [0, 6, 0, 2],
    "one token": [0, 0, 1, 0],
    "no tokens": [0, 0, 0, 0],
}
# What a router is made to do: the tokens of all ranks go where the bias says.
FAVOURITES = {"as they like": [], "all elsewhere": [7], "none to the first rank": [3, 4, 5, 6, 7]}


def layer(
    group: Any = None,
    k: int = 0,
    favourites: tuple[int, ...] = (),
    combine: str = "probs",
    shared: int = 0,
    cheap: tuple[int, ...] = (),
) -> MoELayer:
    torch.manual_seed(3)
    sizes = MODEL_DIM, NUM_EXPERTS + sum(cheap)
    router: Any = TopKRouter(*sizes, k) if k else ThresholdRouter(*sizes, 0.6)
    how: dict[str, Any] = {"expert_parallel_group": group, "combine": combine, "shared_experts": shared}
    how["cheap"] = CheapExperts(MODEL_DIM, *cheap) if cheap else None
    moe = MoELayer(MODEL_DIM, 6, NUM_EXPERTS, router, **how)
    with torch.no_grad():  # the first feature of every token is 1: its weight is a bias
        for expert in favourites:
            moe.router.weight[expert, 0] += 9.0
    return moe


def tokens(rank: int, count: int) -> Tensor:
    x_TD = torch.randn(count, MODEL_DIM, generator=torch.Generator().manual_seed(rank))
    x_TD[:, 0] = 1.0
    return x_TD


def forward_backward(moe: MoELayer, x_TD: Tensor, rank_of_T: Tensor) -> dict[str, Tensor]:
    """A loss that weighs every output by its rank, so that a mix-up shows."""
    x_TD.requires_grad_()
    y_TD, routing = moe(x_TD)
    (y_TD.sin() * (1.0 + rank_of_T.unsqueeze(1))).sum().backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    return {"y": y_TD.detach(), "x.grad": x_TD.grad, **gradients}


def put_together(name: str, results: list[dict[str, Tensor]]) -> Tensor:
    parts = [result[name] for result in results]
    is_on_all = name in ("router.weight", "output_bias") or name.startswith(("shared.", "cheap."))
    return sum(parts) if is_on_all else torch.cat(parts)


def compare(counts: list[int], make: Callable[[Any], MoELayer]) -> None:
    def ranks() -> dict[str, Tensor]:
        rank = dist.get_rank()
        x_TD = tokens(rank, counts[rank])
        return forward_backward(make(dist.group.WORLD), x_TD, torch.full((counts[rank],), float(rank)))

    assert_as_one_process(run_ranks(len(counts), ranks), counts, make)


def assert_as_one_process(
    results: list[dict[str, Tensor]], counts: list[int], make: Callable[[Any], MoELayer]
) -> None:
    x_TD = torch.cat([tokens(rank, count) for rank, count in enumerate(counts)])
    rank_of_T = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).float()
    alone = make(None)
    expected = forward_backward(alone, x_TD, rank_of_T)
    # the gradient of x is a sum of the router's weights, which cancel
    scale = float(alone.router.weight.detach().abs().max())
    assert_same({name: put_together(name, results) for name in expected}, expected, scale=scale)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", TOKENS)
def test_ranks_equal_one_for_any_number_of_tokens(case: str, world_size: int) -> None:
    compare(TOKENS[case][-world_size:], layer)


@pytest.mark.parametrize("case", FAVOURITES)
def test_ranks_equal_one_wherever_the_tokens_go(case: str) -> None:
    """A rank all of whose rows go elsewhere, a rank that receives none, experts without rows."""
    for k in (0, 1):
        compare([4, 3], lambda group: layer(group, k, tuple(FAVOURITES[case])))  # noqa: B023


@pytest.mark.parametrize("combine", ["ones", "normalized"])
def test_ranks_equal_one_with_other_weights(combine: str) -> None:
    compare(TOKENS["uneven"], lambda group: layer(group, combine=combine))


def test_every_rank_holds_the_shared_experts() -> None:
    compare(TOKENS["some ranks without tokens"], lambda group: layer(group, shared=2))


@pytest.mark.parametrize("case", ["uneven", "some ranks without tokens"])
def test_cheap_experts_are_where_the_tokens_are(case: str) -> None:
    compare(TOKENS[case], lambda group: layer(group, cheap=(1, 1, 2)))


class Recomputed(MoELayer):
    def forward(self, *args: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False, context_fn=keep_scores)


def test_a_recomputation_exchanges_the_same_rows() -> None:
    """Of numbers with a point rows 6 times (there and back, again, and their gradients), and the weights'
    gradients; of whole ones choices and counts twice."""
    plain_score, counts = Router.score, TOKENS["some ranks without tokens"]

    def score(self: Router, x_TD: Tensor) -> Tensor:
        """The second time far more off than sums in another order are."""
        return plain_score(self, x_TD) * (1 if torch._C._current_graph_task_id() == -1 else 2)

    def exchanges(received: Tensor, *args: Any, **kwargs: Any) -> Any:
        made[received.is_floating_point()] += 1
        return plain_exchange(received, *args, **kwargs)

    made: Counter[bool] = Counter()
    plain_exchange = dist.all_to_all_single

    def ranks() -> dict[str, Tensor]:
        moe, rank = layer(dist.group.WORLD), dist.get_rank()
        moe.__class__ = Recomputed
        with patch.object(dist, "all_to_all_single", exchanges), patch.object(Router, "score", score):
            found = forward_backward(
                moe, tokens(rank, counts[rank]), torch.full((counts[rank],), float(rank))
            )
        return {**found, "floats": torch.tensor(made[True]), "integers": torch.tensor(made[False])}

    results = run_ranks(len(counts), ranks)
    for result in results:
        assert (int(result.pop("floats")), int(result.pop("integers"))) == (7, 4)
    assert_as_one_process(results, counts, layer)


def penalty_gradients(moe: MoELayer, x_TD: Tensor) -> dict[str, Tensor]:
    """Of a penalty on the gradient of x: second derivatives."""
    x_TD.requires_grad_()
    (grad_TD,) = torch.autograd.grad(moe(x_TD)[0].sin().sum(), x_TD, create_graph=True)
    grad_TD.square().sum().backward()
    return {"x.grad": x_TD.grad, **{name: p.grad for name, p in moe.named_parameters() if p.grad is not None}}


def test_ranks_equal_one_in_second_derivatives() -> None:
    counts = [3, 0, 5, 1]

    def ranks() -> dict[str, Tensor]:
        rank = dist.get_rank()
        return penalty_gradients(layer(dist.group.WORLD), tokens(rank, counts[rank]))

    results = run_ranks(len(counts), ranks)
    whole = torch.cat([tokens(rank, count) for rank, count in enumerate(counts)])
    expected = penalty_gradients(layer(), whole)
    assert len(expected) == 6  # x, the router, four stacks
    assert_same({name: put_together(name, results) for name in expected}, expected)


def test_a_part_holds_what_the_whole_holds_and_leaves_the_random_state_alike() -> None:
    def ranks() -> tuple[dict[str, Tensor], Tensor]:
        return layer(dist.group.WORLD).state_dict(), torch.rand(1)

    whole = layer().state_dict()
    after = torch.rand(1)
    results = run_ranks(2, ranks)
    for name, value in whole.items():
        parts = [state[name] for state, _ in results]
        assert torch.equal(parts[0] if name == "router.weight" else torch.cat(parts), value), name
    assert all(torch.equal(following, after) for _, following in results)


def test_whole_state_dicts_load_into_any_part() -> None:
    whole = {name: torch.randn_like(value) for name, value in layer().state_dict().items()}

    def ranks() -> Tensor:
        moe = layer(dist.group.WORLD)
        moe.load_state_dict(whole)
        moe.load_state_dict(moe.state_dict())  # and its own part
        return moe.experts.fc1_weight.detach()

    parts = run_ranks(2, ranks)
    assert torch.equal(torch.cat(parts), whole["experts.fc1_weight"])
    wrong = {**whole, "experts.fc1_weight": torch.zeros(6, 6, MODEL_DIM)}
    with pytest.raises(RuntimeError, match="experts.fc1_weight"):
        layer().load_state_dict(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_rank_takes_part_in_the_backward_exchange(dtype: torch.dtype) -> None:
    """Rank 0's rows need no gradient; rank 1 sends no row, yet gets gradients for none."""

    def ranks() -> tuple[Tensor, Tensor | None]:
        rank = dist.get_rank()
        send, receive = ([1, 2], [1, 0]) if rank == 0 else ([0, 0], [2, 0])
        rows_RD = torch.arange(6.0, dtype=dtype).view(3, 2)[: sum(send)].requires_grad_(rank == 1)
        received_RD = exchange_rows(rows_RD, Sizes(send, receive), dist.group.WORLD)
        received_RD.float().sum().backward()
        return received_RD.detach(), rows_RD.grad

    (first, no_gradient), (second, gradient) = run_ranks(2, ranks)
    assert first.tolist() == [[0, 1]] and second.tolist() == [[2, 3], [4, 5]]
    assert no_gradient is None and gradient is not None and gradient.shape == (0, 2)
