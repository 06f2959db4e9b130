"""The experts in C++ equal plain autograd: values and every gradient."""

import faulthandler
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from expert_calls import layer_values_and_gradients, values_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from tolerances import TERMS, assert_same
from torch import Tensor
from torch.autograd import forward_ad

from xmoe_fairseq.moe import Experts, MoELayer, ThresholdRouter, TopKRouter, use_kernel
from xmoe_fairseq.moe.experts import Call, ExpertRows, Stacks, native
from xmoe_fairseq.moe.experts.kernels import expert_sums
from xmoe_fairseq.moe.experts.native import expert_sums_native, refuse
from xmoe_fairseq.moe.experts.plain import expert_sums_plain
from xmoe_fairseq.moe.native import missing, routing

pytestmark = pytest.mark.usefixtures("native_library")

SOURCES = 300
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
LOADS = {
    "uneven": [300, 1, 0, 280, 7],
    "one expert has all": [0, 300, 0, 0, 0],
    "one row": [0, 0, 0, 1, 0],
    "no rows": [0, 0, 0, 0, 0],
}


def stacks_of(
    num_experts: int, model_dim: int, expert_dim: int, dtype: torch.dtype = torch.float64
) -> Stacks:
    experts = Experts(num_experts, model_dim, expert_dim).to(dtype)
    return Stacks(*(stack.detach() for stack in experts.stacked()))


def in_precision(stacks: Stacks, dtype: torch.dtype) -> Stacks:
    return Stacks(*(stack.to(dtype) for stack in stacks))


def rows_of(counts: list[int], sources: int, weighted: bool = True) -> ExpertRows:
    source_R = torch.cat([torch.randperm(sources)[:count].sort().values for count in counts])
    weight_R = torch.rand(sum(counts), dtype=torch.float64) if weighted else None
    return ExpertRows(source_R, weight_R, torch.tensor(counts))


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_plain_autograd(activation: str, load: str, weighted: bool, threads: int) -> None:
    rows, x_SD = rows_of(LOADS[load], SOURCES, weighted), torch.randn(SOURCES, 48, dtype=torch.float64)
    call = x_SD, rows, stacks_of(5, 48, 96), ACTIVATIONS[activation]
    got = values_and_gradients(expert_sums_native, *call)
    assert_same(got, values_and_gradients(expert_sums_plain, *call))
    with torch.no_grad():
        assert_same(expert_sums_native(*call), got[0])


@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """More threads than rows or experts, odd widths, few tokens, none."""
    sources, model_dim, expert_dim = (data.draw(st.integers(low, 9)) for low in (0, 1, 1))
    counts = data.draw(st.lists(st.integers(0, sources), min_size=1, max_size=6))
    rows = rows_of(counts, sources, data.draw(st.booleans()))
    x_SD = torch.randn(sources, model_dim, dtype=torch.float64)
    call = x_SD, rows, stacks_of(len(counts), model_dim, expert_dim), F.silu
    got = values_and_gradients(expert_sums_native, *call)
    assert_same(got, values_and_gradients(expert_sums_plain, *call), scale=1)


@pytest.mark.parametrize("widths", [(72, 40), (40, 136), (8, 1), (1, 70)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_tiles(activation: str, widths: tuple[int, int], threads: int) -> None:
    """fp32 goes in tiles of 64 rows, padded to 16, and blocks of 64; up to four rows by themselves."""
    counts, (model_dim, expert_dim) = [64, 65, 130, 128, 5, 16, 17, 4, 0, 1, 9], widths
    rows, stacks = rows_of(counts, 130), stacks_of(len(counts), model_dim, expert_dim)
    x_SD = torch.randn(130, model_dim, dtype=torch.float64)
    exact = values_and_gradients(expert_sums_plain, x_SD, rows, stacks, ACTIVATIONS[activation])
    mine = ExpertRows(rows.source_R, rows.weight_R.float(), rows.counts_E)
    call = x_SD.float(), mine, in_precision(stacks, torch.float32), ACTIVATIONS[activation]
    got = values_and_gradients(expert_sums_native, *call)
    assert_same(got, [tensor.float() for tensor in exact], terms=512, dtype=torch.float32)
    with torch.no_grad():
        assert_same(expert_sums_native(*call), got[0])


@pytest.mark.parametrize("dtype, terms", [(torch.float32, 512), (torch.bfloat16, 1)])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_other_precisions(activation: str, dtype: torch.dtype, terms: int, threads: int) -> None:
    """Sums are taken in fp32, of bf16 too."""
    rows, stacks = rows_of(LOADS["uneven"], SOURCES), stacks_of(5, 48, 96, dtype)
    x_SD = torch.randn(SOURCES, 48, dtype=dtype)
    mine = ExpertRows(rows.source_R, rows.weight_R.float(), rows.counts_E)
    got = values_and_gradients(expert_sums_native, x_SD, mine, stacks, ACTIVATIONS[activation])
    assert got[0].dtype == torch.float32
    exact = values_and_gradients(
        expert_sums_plain, x_SD.double(), rows, in_precision(stacks, torch.float64), ACTIVATIONS[activation]
    )
    assert_same(got, [t.to(own) for t, own in zip(exact, got, strict=True)], terms=terms, dtype=dtype)


def small_call() -> tuple[list[Tensor], Callable[..., Tensor]]:
    rows = rows_of([2, 0, 3], 5)
    inputs = [torch.randn(5, 3, dtype=torch.float64), rows.weight_R, *stacks_of(3, 3, 4)]

    def compute(x_SD: Tensor, weight_R: Tensor, *stacks: Tensor, **options: float) -> Tensor:
        torch.manual_seed(3)  # dropout's draw
        weighted = ExpertRows(rows.source_R, weight_R, rows.counts_E)
        return expert_sums_native(x_SD, weighted, Stacks(*stacks), F.gelu, **options)

    return [tensor.detach().requires_grad_() for tensor in inputs], compute


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_and_theirs(dropout: float) -> None:
    inputs, compute = small_call()
    assert torch.autograd.gradcheck(lambda *inputs: compute(*inputs, dropout=dropout), inputs)
    assert torch.autograd.gradgradcheck(lambda *inputs: compute(*inputs, dropout=dropout), inputs)


@pytest.mark.parametrize(
    "frozen", [["x"], ["weight"], ["fc1_weight", "fc1_bias"], ["fc2_weight"], ["fc2_bias"]]
)
def test_what_is_frozen_has_no_gradient_and_the_others_have_theirs(frozen: list[str]) -> None:
    names = ["x", "weight", *Stacks._fields]
    inputs, compute = small_call()
    expected = dict(zip(names, torch.autograd.grad(compute(*inputs).square().sum(), inputs), strict=True))
    for name, tensor in zip(names, inputs, strict=True):
        tensor.requires_grad_(name not in frozen)
    compute(*inputs).square().sum().backward()
    for name, tensor in zip(names, inputs, strict=True):
        if name in frozen:
            assert tensor.grad is None
        else:
            assert torch.equal(tensor.grad, expected[name])


def test_the_same_bits_every_time(threads: int) -> None:
    rows, x_SD = rows_of(LOADS["uneven"], SOURCES), torch.randn(SOURCES, 48, dtype=torch.float64)
    stacks = stacks_of(5, 48, 96)
    first, *others = (values_and_gradients(expert_sums_native, x_SD, rows, stacks, F.relu) for _ in range(5))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_shares_by_hand() -> None:
    """Cut between experts where that is about as good, within one where it is not."""

    def shares(counts: list[int], threads: int, work: int = 2**20) -> list[list[int]]:
        torch.set_num_threads(threads)
        return torch.ops.xmoe.shares(torch.tensor(counts), work).tolist()

    assert shares([32, 0, 33, 30, 33], 2) == [[0, 0, 0, 32], [0, 2, 32, 65], [1, 3, 65, 95], [1, 4, 95, 128]]
    assert shares([10, 90], 2) == [[0, 0, 0, 10], [0, 1, 10, 50], [1, 1, 50, 100]]
    assert shares([9], 3) == [[0, 0, 0, 3], [1, 0, 3, 6], [2, 0, 6, 9]]
    assert shares([1, 0, 1], 4) == [[0, 0, 0, 1], [1, 2, 1, 2]]
    assert shares([8, 8], 2, work=100) == [[0, 0, 0, 8], [0, 1, 8, 16]]  # too little work for two
    assert shares([0, 0], 2) == []


def test_strided_and_expanded_inputs() -> None:
    rows = rows_of([4, 1, 0, 7], 9)
    stacks = Stacks(*(stack.mT.contiguous().mT for stack in stacks_of(4, 8, 16)))
    x_SD = torch.randn(8, 9, dtype=torch.float64).t().requires_grad_()
    y_SD = expert_sums_native(x_SD, rows, stacks, F.relu)
    expected_SD = expert_sums_plain(x_SD, rows, stacks, F.relu)
    assert_same(y_SD, expected_SD)
    got, expected = (
        torch.autograd.grad(y.sum(), x_SD)[0] for y in (y_SD, expected_SD)
    )  # an expanded gradient
    assert_same(got, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_takes_its_share_and_scales_the_rest(activation: str, threads: int) -> None:
    """Experts whose hidden units are all activation(1), and whose outputs are those units."""
    units = 64
    stacks = Stacks(
        torch.zeros(2, units, units),
        torch.ones(2, units),
        torch.eye(units).repeat(2, 1, 1),
        torch.zeros(2, units),
    )
    rows = ExpertRows(torch.arange(200), None, torch.tensor([150, 50]))
    x_SD = torch.zeros(200, units, requires_grad=True)

    def compute(dropout: float) -> Tensor:
        torch.manual_seed(7)
        return expert_sums_native(x_SD, rows, stacks, ACTIVATIONS[activation], dropout)

    y_SD, kept = compute(0.25), ACTIVATIONS[activation](torch.ones(())) / 0.75
    assert_same(y_SD, torch.where(y_SD == 0, 0.0, kept))
    assert abs((y_SD == 0).double().mean() - 0.25) < 0.02
    assert torch.equal(y_SD, compute(0.25))
    with torch.no_grad():
        assert torch.equal(y_SD, compute(0.25))
    torch.set_num_threads(1)
    assert torch.equal(y_SD, compute(0.25))  # whatever the number of threads
    assert not compute(1.0).any()


def test_dropout_has_the_gradients_of_what_it_kept() -> None:
    """relu keeps no mask: what was taken is 0 in its output."""
    rows, x_SD, stacks = rows_of([5, 7], 9), torch.randn(9, 8, dtype=torch.float64), stacks_of(2, 8, 16)

    def with_mask(*arguments: object) -> Tensor:
        torch.manual_seed(7)
        keeps = iter(torch.empty(12, 16, dtype=torch.bool).bernoulli_(0.6).split([5, 7]))
        return expert_sums_plain(*arguments[:3], lambda inner: F.relu(inner) * next(keeps) / 0.6)

    def native(*arguments: object) -> Tensor:
        torch.manual_seed(7)
        return expert_sums_native(*arguments, 0.4)

    call = x_SD, rows, stacks, F.relu
    assert_same(values_and_gradients(native, *call), values_and_gradients(with_mask, *call))


def test_inference_mode() -> None:
    stacks, rows = stacks_of(2, 8, 16), rows_of([5, 7], 9)
    with torch.inference_mode():
        x_SD = torch.randn(9, 8, dtype=torch.float64)
        y_SD = expert_sums_native(x_SD, rows, stacks, F.gelu)
        assert y_SD.is_inference()
        assert_same(y_SD, expert_sums_plain(x_SD, rows, stacks, F.gelu))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("operator", ["experts", "routing"])
def test_forward_mode_is_refused_and_not_0(operator: str, enabled: bool) -> None:
    """Of frozen parameters too. What is computed in Python has the derivative."""
    stacks, rows = stacks_of(3, 8, 16), rows_of([5, 7, 2], 9)
    router = TopKRouter(8, 8, 2).double()

    def compute(x_SD: Tensor) -> Tensor:
        if operator == "routing":
            return router(x_SD).weight_R
        return expert_sums(Call(x_SD, rows, stacks, F.gelu))

    x_SD, direction_SD = torch.randn(2, 9, 8, dtype=torch.float64)
    with torch.set_grad_enabled(enabled):
        with pytest.raises(RuntimeError, match="autograd.Function"):
            torch.func.jvp(compute, (x_SD,), (direction_SD,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="autograd.Function"):
            compute(forward_ad.make_dual(x_SD, direction_SD))
        with use_kernel("plain"):
            _, found = torch.func.jvp(compute, (x_SD,), (direction_SD,))
            step = 1e-6
            expected = compute(x_SD + step * direction_SD) - compute(x_SD - step * direction_SD)
    torch.testing.assert_close(found, expected / (2 * step), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_stay_where_they_are(activation: str, dtype: torch.dtype) -> None:
    stacks, rows = stacks_of(2, 8, 16, dtype), rows_of([9, 9], 9, weighted=False)
    x_SD = torch.randn(9, 8, dtype=dtype)
    x_SD[3, 2], x_SD[5, 0] = torch.nan, torch.inf
    call = x_SD, rows, stacks, ACTIVATIONS[activation]
    got, expected = (values_and_gradients(way, *call) for way in (expert_sums_native, expert_sums_plain))
    for mine, plain in zip(got, expected, strict=True):
        assert torch.equal(mine.isfinite(), plain.isfinite())
        assert_same(
            mine.nan_to_num(0, 0, 0), plain.nan_to_num(0, 0, 0), terms=1 if dtype == torch.bfloat16 else TERMS
        )


def test_a_token_may_come_to_an_expert_more_than_once(threads: int) -> None:
    """As a router of somebody's own may choose; with threads, also on both sides of a cut."""
    source_R = torch.randint(20, (400,))
    rows = ExpertRows(source_R, torch.rand(400, dtype=torch.float64), torch.tensor([0, 390, 10]))
    call = torch.randn(20, 48, dtype=torch.float64), rows, stacks_of(3, 48, 96), F.silu
    got, expected = (values_and_gradients(way, *call) for way in (expert_sums_native, expert_sums_plain))
    assert_same(got, expected)


@pytest.mark.parametrize(
    "tokens, num_experts, threshold, limit",
    [(0, 6, 0.6, 0), (40, 1, 0.6, 0), (40, 1500, 0.6, 3), (3, 1100, 1.0, 0), (4000, 3, 0.0, 0)],
    ids=["no tokens", "one expert", "many experts", "all of many", "many tokens"],
)
def test_layers_at_the_edges(
    tokens: int, num_experts: int, threshold: float, limit: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = ThresholdRouter(8, num_experts, threshold, limit)
    layer = MoELayer(8, 4, num_experts, router).double()
    x_TD = torch.randn(tokens, 8, dtype=torch.float64)
    got = layer_values_and_gradients(layer, x_TD)
    for module in (native, routing):
        monkeypatch.setattr(module, "missing", lambda: "it is gone")
    with use_kernel("plain"):
        assert_same(got, layer_values_and_gradients(layer, x_TD))


def test_what_is_refused() -> None:
    stacks, rows, x_SD = stacks_of(2, 8, 16), rows_of([5, 7], 9), torch.randn(9, 8, dtype=torch.float64)
    call = Call(x_SD, rows, stacks, F.relu)
    assert refuse(call) == ""
    assert refuse(call._replace(x_SD=x_SD.to("meta"))) == "a CPU, got meta"
    assert refuse(call._replace(activation=torch.tanh)) == "relu, gelu or silu, got tanh"
    half = call._replace(x_SD=x_SD.half(), stacks=in_precision(stacks, torch.float16))
    assert refuse(half).endswith("got torch.float16")
    single = call._replace(x_SD=x_SD.float(), stacks=in_precision(stacks, torch.float32))
    assert refuse(single) == "weights in torch.float32, got torch.float64"
    assert "experts in x's precision" in refuse(call._replace(x_SD=x_SD.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # to which the caller casts
        assert refuse(call._replace(rows=ExpertRows(rows.source_R, None, rows.counts_E))) == ""


@pytest.mark.parametrize("broken", ["a source that is not there", "fewer rows than counts", "negative count"])
def test_what_would_read_outside_its_memory_is_an_error(broken: str) -> None:
    rows, x_SD = rows_of([5, 7], 9), torch.randn(9, 8, dtype=torch.float64)
    source_R, counts_E = rows.source_R.clone(), rows.counts_E.clone()
    if broken == "a source that is not there":
        source_R[3] = 9
    else:
        counts_E += torch.tensor([1, 0] if broken == "fewer rows than counts" else [-6, 6])
    with pytest.raises((RuntimeError, IndexError)):
        expert_sums_native(x_SD, ExpertRows(source_R, rows.weight_R, counts_E), stacks_of(2, 8, 16), F.relu)


def test_schemas_and_shapes() -> None:
    """For torch.compile: what is changed in place (nothing), and the shapes without computing."""
    rows, stacks, x_SD = rows_of([5, 7], 9), stacks_of(2, 8, 16), torch.randn(9, 8, dtype=torch.float64)
    call = x_SD, rows.source_R, rows.weight_R, rows.counts_E, *stacks, 1, None, 1.0
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.xmoe.expert_sums.default, (*call, True), test_utils=tests)
    _, inner_RF = torch.ops.xmoe.expert_sums(*call, True)
    torch.library.opcheck(
        torch.ops.xmoe.expert_gradients.default, (x_SD, inner_RF, *call, [True] * 6), test_utils=tests
    )


def sums_in_two_threads(x_SD: Tensor, rows: ExpertRows, stacks: Stacks) -> Tensor:
    torch.set_num_threads(2)
    with torch.no_grad():
        y_SD = expert_sums_native(x_SD, rows, stacks, F.relu)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)  # with more, any large operator of torch's hangs in a fork
    return y_SD


def forks_of_a_process_that_has_used_threads() -> list[int | None]:
    """Exit statuses of three forks that compute what this process has computed; not 0 for one that hangs."""
    assert not missing()
    rows, x_SD = rows_of(LOADS["uneven"], SOURCES), torch.randn(SOURCES, 48, dtype=torch.float64)
    call = x_SD, rows, stacks_of(5, 48, 96)
    expected = sums_in_two_threads(*call)

    def compute() -> None:
        faulthandler.dump_traceback_later(30, file=sys.__stderr__)  # where it hangs
        assert_same(sums_in_two_threads(*call), expected)

    children = [multiprocessing.get_context("fork").Process(target=compute) for _ in range(3)]
    for child in children:
        child.start()
        child.join(60)
        child.kill()
    return [child.exitcode for child in children]


def test_forks_of_a_process_that_has_used_threads() -> None:
    """OpenMP's threads are not in them, and they would wait for them.

    In a process of its own: what other tests have left (locks that a thread holds, objects that wait for a
    thread when they are collected) may stop a fork, too.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        assert alone.submit(forks_of_a_process_that_has_used_threads).result() == [0, 0, 0]
