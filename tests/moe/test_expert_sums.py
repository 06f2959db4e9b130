"""The fast ways to compute the experts equal plain autograd: values and every gradient."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import TERMS, assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe_fairseq.moe import Experts
from xmoe_fairseq.moe.dispatch.local import ExpertRows
from xmoe_fairseq.moe.experts import chunks as expert_chunks
from xmoe_fairseq.moe.experts.chunks import compute
from xmoe_fairseq.moe.experts.grouped import can_group, expert_sums_grouped
from xmoe_fairseq.moe.experts.loop import expert_sums_loop
from xmoe_fairseq.moe.experts.plain import Stacks, expert_sums_plain
from xmoe_fairseq.moe.experts.single import expert_sums_single, is_single

SOURCES, MODEL_DIM, EXPERT_DIM = 9, 8, 16
LOADS = {
    "uneven": [4, 1, 0, 7],
    "one expert has all": [0, 9, 0, 0],
    "one row": [0, 0, 0, 1],
    "no rows": [0, 0, 0, 0],
}
FAST = {"loop": expert_sums_loop} | ({"grouped": expert_sums_grouped} if hasattr(F, "grouped_mm") else {})


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That share the smallest work."""
    monkeypatch.setattr(expert_chunks, "THREAD_WORK", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


def stacks_of(num_experts: int, dtype: torch.dtype) -> Stacks:
    experts = Experts(num_experts, MODEL_DIM, EXPERT_DIM).to(dtype)
    return Stacks(*(stack.detach() for stack in experts.stacked()))


def rows_of(counts: list[int], weighted: bool, dtype: torch.dtype = torch.float32) -> ExpertRows:
    """Within an expert each source at most once, as in any routing."""
    source_R = torch.cat([torch.randperm(SOURCES)[:count].sort().values for count in counts])
    weight_R = torch.rand(sum(counts), dtype=dtype) if weighted else None
    return ExpertRows(source_R, weight_R, torch.tensor(counts))


def values_and_gradients(
    compute: Callable[..., Tensor], x_SD: Tensor, rows: ExpertRows, stacks: Stacks, activation: Callable
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x_SD, *stacks)]
    if rows.weight_R is not None:
        leaves.append(rows.weight_R.detach().requires_grad_())
        rows = ExpertRows(rows.source_R, leaves[-1], rows.counts_E)
    y_SD = compute(leaves[0], rows, Stacks(*leaves[1:5]), activation)
    direction = torch.linspace(-1, 2, y_SD.numel(), dtype=y_SD.dtype).view(y_SD.shape)
    y_SD.backward(direction)
    return [y_SD.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fast", FAST)
def test_equals_plain_autograd(
    fast: str, activation: str, load: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_chunks, "CHUNK_ROWS", 5)  # several chunks, also of several experts
    rows, stacks, x_SD = rows_of(LOADS[load], weighted), stacks_of(4, torch.float32), torch.randn(9, 8)
    arguments = (x_SD, rows, stacks, ACTIVATIONS[activation])
    got = values_and_gradients(FAST[fast], *arguments)
    assert_same(got, values_and_gradients(expert_sums_plain, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("counts", [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_token(activation: str, counts: list[int], weighted: bool, dtype: torch.dtype) -> None:
    weight_R = torch.rand(sum(counts), dtype=dtype) if weighted else None
    rows = ExpertRows(torch.zeros(sum(counts), dtype=torch.long), weight_R, torch.tensor(counts))
    arguments = torch.randn(1, 8, dtype=dtype), rows, stacks_of(4, dtype), ACTIVATIONS[activation]
    before = [stack.clone() for stack in arguments[2]]
    with torch.no_grad():
        y_1D = expert_sums_single(*arguments)
    assert_same(y_1D, expert_sums_plain(*arguments))
    assert all(map(torch.equal, arguments[2], before))  # what is added to are copies


def test_which_tokens_are_computed_alone() -> None:
    one = torch.ones(1, 8)
    with torch.no_grad():
        assert is_single(one) and is_single(one.double())
        assert not is_single(torch.ones(2, 8)) and not is_single(one[:0])
        assert not is_single(one.bfloat16())  # sums are fp32
    assert not is_single(one)  # gradients


MODULES = {"of its own weight": nn.PReLU(), "random": nn.RReLU(), "in place": nn.SiLU(inplace=True)}


@pytest.mark.parametrize("activation", MODULES)
def test_a_module_may_be_the_activation(activation: str) -> None:
    module = MODULES[activation].train()
    experts, rows, x_SD = (
        Experts(4, MODEL_DIM, EXPERT_DIM, module),
        rows_of([4, 1, 0, 7], True),
        torch.randn(9, 8),
    )
    leaves = [x_SD.requires_grad_(), *experts.parameters()]
    torch.manual_seed(1)
    got = torch.autograd.grad(experts(x_SD, rows).square().sum(), leaves)
    torch.manual_seed(1)
    y_SD = expert_sums_plain(x_SD, rows, experts.stacked(), module)
    assert_same(got, torch.autograd.grad(y_SD.square().sum(), leaves))
    with torch.no_grad():
        torch.manual_seed(1)
        assert_same(experts(x_SD, rows), y_SD)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_experts(load: str, weighted: bool) -> None:
    rows, stacks, x_SD = rows_of(LOADS[load], weighted), stacks_of(4, torch.float32), torch.randn(9, 8)
    got = values_and_gradients(expert_sums_loop, x_SD, rows, stacks, F.gelu)
    expected = values_and_gradients(expert_sums_plain, x_SD, rows, stacks, F.gelu)
    assert_same(got, expected)
    with torch.no_grad():
        assert_same(expert_sums_loop(x_SD, rows, stacks, F.gelu), expected[0])
    assert torch.get_num_threads() == 3  # again


@pytest.mark.usefixtures("three_threads")
def test_a_fault_in_a_thread_is_raised_and_the_threads_are_as_before() -> None:
    with pytest.raises(ZeroDivisionError):
        compute(lambda share: 1 // len(share), [[], [], []])
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    "fast, dtype, terms",
    [("loop", torch.float64, TERMS), ("loop", torch.bfloat16, 1), ("grouped", torch.bfloat16, 1)],
)
def test_other_precisions(fast: str, dtype: torch.dtype, terms: int) -> None:
    """Sums are taken in the precision of the weights: fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, stacks, x_SD = (
        rows_of([4, 1, 0, 7], True, wide),
        stacks_of(4, dtype),
        torch.randn(9, 8, dtype=dtype),
    )
    got = values_and_gradients(FAST[fast], x_SD, rows, stacks, F.gelu)
    exact = values_and_gradients(
        expert_sums_plain, x_SD.double(), ExpertRows(rows.source_R, rows.weight_R.double(), rows.counts_E),
        Stacks(*(stack.double() for stack in stacks)), F.gelu,
    )  # fmt: skip
    assert got[0].dtype == wide
    assert_same(got, [t.to(mine) for t, mine in zip(exact, got, strict=True)], terms=terms, dtype=dtype)


def test_plain_autograd_has_the_right_gradients() -> None:
    rows = rows_of([2, 0, 3], True, torch.float64)
    inputs = [t.requires_grad_() for t in (torch.randn(9, 8).double(), *stacks_of(3, torch.float64))]

    def compute(x_SD: Tensor, *stacks: Tensor) -> Tensor:
        return expert_sums_plain(x_SD, rows, Stacks(*stacks), torch.tanh)

    assert torch.autograd.gradcheck(compute, inputs)


def test_strided_and_expanded_inputs() -> None:
    rows, stacks = rows_of([4, 1, 0, 7], True), stacks_of(4, torch.float32)
    x_SD = torch.randn(8, 9).t()
    y = expert_sums_loop(x_SD.requires_grad_(), rows, stacks, F.relu)
    assert_same(y, expert_sums_plain(x_SD, rows, stacks, F.relu))
    y.sum().backward()  # an expanded gradient
    (expected,) = torch.autograd.grad(expert_sums_plain(x_SD, rows, stacks, F.relu).sum(), x_SD)
    assert_same(x_SD.grad, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_loop_gives_the_same_bits_every_time(threads: int, request: pytest.FixtureRequest) -> None:
    if threads == 3:
        request.getfixturevalue("three_threads")
    rows, stacks, x_SD = rows_of([4, 1, 9, 7], True), stacks_of(4, torch.float32), torch.randn(9, 8)
    first, second = (values_and_gradients(expert_sums_loop, x_SD, rows, stacks, F.relu) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_computes_in_its_precision_and_leaves_fp32_gradients() -> None:
    experts, x_SD = Experts(4, MODEL_DIM, EXPERT_DIM), torch.randn(9, 8)
    rows = rows_of([4, 1, 0, 7], True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x_SD, rows)
    assert y.dtype == torch.float32  # the weights'
    assert_same(y, experts(x_SD, rows), terms=1, dtype=torch.bfloat16)
    assert not torch.equal(y, experts(x_SD, rows))
    y.sum().backward()
    assert experts.fc1_weight.grad.dtype == torch.float32


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    with torch.no_grad():
        y = expert_sums_loop(torch.randn(9, 8), rows_of([3, 0], True), stacks_of(2, torch.float32), F.relu)
    assert y.grad_fn is None


def test_grouped_products_are_for_gpus() -> None:
    assert not can_group(torch.randn(9, 8, dtype=torch.bfloat16), stacks_of(2, torch.bfloat16))


class ScatteredSums(TorchDispatchMode):
    """Notes into what precision rows are added one by one: on a GPU with atomics, which round each time."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.rstrip("_") in ("aten::index_add", "aten::index_put", "aten::scatter_add"):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_grouped_bias_gradients_of_many_rows() -> None:
    """Of gradients with a mean, which a sum in bf16 stops following after a few hundred rows. (A CPU's
    index_add takes its sums in fp32, so the value alone would not show it here.)"""
    counts, sources = [3000, 0, 1000, 90], 4096
    source_R = torch.cat([torch.randperm(sources)[:count].sort().values for count in counts])
    rows = ExpertRows(source_R, torch.rand(sum(counts)), torch.tensor(counts))
    stacks = Stacks(*(stack.bfloat16().requires_grad_() for stack in stacks_of(4, torch.float32)))
    x_SD, grad_SD = torch.randn(sources, MODEL_DIM).bfloat16(), torch.randn(sources, MODEL_DIM) + 0.5
    exact = Stacks(*(stack.detach().double().requires_grad_() for stack in stacks))
    with ScatteredSums() as sums:
        expert_sums_grouped(x_SD, rows, stacks, F.relu).backward(grad_SD)
    assert torch.bfloat16 not in sums.dtypes
    exact_rows = ExpertRows(source_R, rows.weight_R.double(), rows.counts_E)
    expert_sums_plain(x_SD.double(), exact_rows, exact, F.relu).backward(grad_SD.double())
    for got, expected in ((stacks.fc1_bias, exact.fc1_bias), (stacks.fc2_bias, exact.fc2_bias)):
        assert (got.grad.double() - expected.grad).norm() < 0.02 * expected.grad.norm()
        assert not got.grad[1].any()


def test_a_torch_without_grouped_products_takes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is accepted from 2.6 on; its grouped product is public since 2.10."""
    x_SD = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda", element_size=lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    stacks = Stacks(*(torch.zeros(2, 16, 16) for _ in range(4)))
    assert can_group(x_SD, stacks)
    monkeypatch.delattr(F, "grouped_mm")
    assert not can_group(x_SD, stacks)
