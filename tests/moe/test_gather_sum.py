"""Sums of rows by source: as a GPU takes them, which torch can on any device, and as a CPU does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe_fairseq.moe import MoELayer, TopKRouter, use_kernel
from xmoe_fairseq.moe.dispatch import gather_sum
from xmoe_fairseq.moe.dispatch.gather_sum import BySource, gather_rows, sum_rows

NUM_SOURCES, WIDTH = 5, 3
SOURCES = {
    "none, one, many": [3, 0, 3, 3, 1, 3, 0, 3],
    "one each": [4, 2, 0, 1, 3],
    "all of one": [2] * 40,
    "no rows": [],
}
orders = pytest.mark.parametrize("order_of", [BySource.of, BySource.sorted], ids=["as they lie", "by source"])
sources = pytest.mark.parametrize("source", SOURCES)
weighted = pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])


def test_the_order() -> None:
    order = BySource.sorted(torch.tensor([2, 0, 2, 3, 0]), 5)
    assert order.row_R.tolist() == [1, 4, 0, 2, 3]
    assert order.first_S1.tolist() == [0, 2, 2, 4, 5, 5]
    empty = BySource.sorted(torch.zeros(0, dtype=torch.long), 0)
    assert (empty.row_R.tolist(), empty.first_S1.tolist()) == ([], [0])
    assert BySource.of(torch.tensor([2, 0]), 5)[2:] == (None, None), "a CPU need not sort"


def inputs_of(source: str, weighted: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    source_R = torch.tensor(SOURCES[source], dtype=torch.long)
    y_RD = torch.randn(len(source_R), WIDTH).to(dtype).requires_grad_()
    weights = torch.rand(len(source_R), dtype=torch.promote_types(dtype, torch.float32)) + 0.1
    return source_R, y_RD, weights.requires_grad_() if weighted else None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@weighted
@sources
@orders
def test_sums_and_gradients_are_those_of_index_add(
    order_of: Any, source: str, weighted: bool, dtype: torch.dtype
) -> None:
    source_R, y_RD, weight_R = inputs_of(source, weighted, dtype)
    leaves = [y_RD] if weight_R is None else [y_RD, weight_R]
    got_SD = sum_rows(y_RD, order_of(source_R, NUM_SOURCES), weight_R)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows_RD = exact[0] if weight_R is None else exact[0] * exact[1].unsqueeze(1)
    exact_SD = rows_RD.new_zeros(NUM_SOURCES, WIDTH).index_add(0, source_R, rows_RD)
    assert got_SD.dtype == (dtype if weight_R is None else weight_R.dtype)
    grad_SD = torch.randn(NUM_SOURCES, WIDTH).to(got_SD.dtype)
    grads = torch.autograd.grad(got_SD, leaves, grad_SD)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    exact_grads = torch.autograd.grad(exact_SD, exact, grad_SD.double())
    for mine, theirs in zip((got_SD, *grads), (exact_SD, *exact_grads), strict=True):
        assert_same(mine, theirs.to(mine.dtype), terms=40, dtype=mine.dtype)


@sources
@orders
def test_a_gather_and_its_gradient(order_of: Any, source: str) -> None:
    source_R, grad_RD, _ = inputs_of(source, False, torch.float32)
    x_SD = torch.randn(NUM_SOURCES, WIDTH, requires_grad=True)
    x_RD = gather_rows(x_SD, order_of(source_R, NUM_SOURCES))
    assert torch.equal(x_RD, x_SD[source_R])
    (grad_SD,) = torch.autograd.grad(x_RD, x_SD, grad_RD)
    assert_same(grad_SD, torch.zeros(NUM_SOURCES, WIDTH).index_add(0, source_R, grad_RD))


@orders
def test_gradients_can_be_differentiated_again(order_of: Any) -> None:
    order = order_of(torch.tensor([3, 0, 3, 1]), NUM_SOURCES)
    y_RD, x_SD = (torch.randn(n, 2).double().requires_grad_() for n in (4, NUM_SOURCES))
    weight_R = torch.rand(4).double().requires_grad_()

    def squares(y_RD: Tensor, weight_R: Tensor, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        return sum_rows(y_RD, order, weight_R) ** 2, gather_rows(x_SD, order) ** 2

    assert torch.autograd.gradcheck(squares, (y_RD, weight_R, x_SD))
    assert torch.autograd.gradgradcheck(squares, (y_RD, weight_R, x_SD))


@orders
def test_half_precision_is_summed_in_fp32(order_of: Any) -> None:
    """Of rows with a mean, which a sum in bf16 stops following after a few hundred."""
    order = order_of(torch.zeros(3000, dtype=torch.long), 1)
    y_RD = (torch.randn(3000, WIDTH) + 0.5).bfloat16()
    exact_SD = y_RD.double().sum(0, keepdim=True)
    x_SD = torch.zeros(1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x_SD, order).backward(y_RD)
    for got_SD in (sum_rows(y_RD, order), x_SD.grad):
        assert got_SD.dtype == torch.bfloat16
        assert_same(got_SD, exact_SD.bfloat16(), terms=1)
    assert_same(sum_rows(y_RD, order, dtype=torch.float32), exact_SD.float(), terms=3000)


@weighted
@orders
def test_a_sum_depends_on_the_rows_of_its_source_alone(order_of: Any, weighted: bool) -> None:
    """Bit for bit: wherever they lie among those of others, and whatever these are."""
    source_R, y_RD, weight_R = torch.randint(0, 7, (200,)), torch.randn(200, 33), torch.rand(200)
    weights = weight_R if weighted else None
    together_SD = sum_rows(y_RD, order_of(source_R, 7), weights)
    assert torch.equal(together_SD, sum_rows(y_RD, order_of(source_R, 7), weights))
    for source in range(7):
        (own_N,) = (source_R == source).nonzero(as_tuple=True)
        alone = order_of(torch.zeros_like(own_N), 1)
        alone_1D = sum_rows(y_RD[own_N], alone, weight_R[own_N] if weighted else None)
        assert torch.equal(alone_1D[0], together_SD[source])


class Calls(TorchDispatchMode):
    """Notes torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::").rstrip("_"))
        return func(*args, **(kwargs or {}))


ATOMIC = {"index_add", "index_put", "scatter_add", "scatter_reduce", "embedding_dense_backward"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "equal", "bincount"}


@weighted
def test_there_are_no_atomics_and_no_waits_forward_or_backward(weighted: bool) -> None:
    source_R, y_RD, weight_R = inputs_of("none, one, many", weighted, torch.float32)
    x_SD = torch.randn(NUM_SOURCES, WIDTH, requires_grad=True)
    with Calls() as calls:
        order = BySource.sorted(source_R, NUM_SOURCES)
        y_SD = sum_rows(y_RD * gather_rows(x_SD, order), order, weight_R)
        y_SD.sum().backward()
    assert {"sort", "index_select"} <= set(calls.names)
    assert not (ATOMIC | WAITING) & set(calls.names)


@orders
def test_one_compiled_graph_holds_them_for_any_number_of_rows(order_of: Any) -> None:
    def sums(y_RD: Tensor, weight_R: Tensor, x_SD: Tensor, source_R: Tensor) -> Tensor:
        order = order_of(source_R, x_SD.size(0))
        return sum_rows(y_RD * gather_rows(x_SD, order), order, weight_R)

    compiled = torch.compile(sums, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (40, 57):
        leaves = [torch.randn(num_rows, 8), torch.rand(num_rows), torch.randn(9, 8)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        source_R = torch.randint(0, 9, (num_rows,))
        mine, theirs = (function(*leaves, source_R).square().sum() for function in (compiled, sums))
        assert_same(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves))


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
@pytest.mark.parametrize("combine", ["probs", "normalized"])
def test_a_layer_is_the_same_in_either_order(
    combine: str, capacity_factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = TopKRouter(8, 6, 3)
    layer = MoELayer(8, 4, 6, router, combine=combine, capacity_factor=capacity_factor, min_capacity=1)
    x_TD = torch.randn(11, 8, requires_grad=True)

    def values() -> list[Tensor]:
        with use_kernel("plain"):
            y_TD, _ = layer(x_TD)
        return [y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, *layer.parameters()])]

    expected = values()
    monkeypatch.setattr(BySource, "of", BySource.sorted)
    with Calls() as calls:
        assert_same(values(), expected)
    assert calls.names.count("_embedding_bag_forward_only") + calls.names.count("_embedding_bag") > 0


@pytest.mark.parametrize(
    "has_triton, capability, by",
    [(True, (8, 0), "triton"), (True, (10, 0), "triton"), (True, (7, 5), "torch"), (False, (9, 0), "torch")],
)
def test_which_kernel_sums_on_a_gpu(
    has_triton: bool, capability: tuple[int, int], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_sum, "HAS_TRITON", has_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    rows = SimpleNamespace(is_cuda=True, device="cuda")
    assert gather_sum.takes_triton(rows) == (by == "triton")
