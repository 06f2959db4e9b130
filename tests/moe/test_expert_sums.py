"""Every kernel equals plain autograd: values and every gradient; and which one is chosen."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import expert_calls
import pytest
import torch
import torch.nn.functional as F
from documented import example
from tolerances import assert_same
from torch import Tensor, nn

from xmoe_fairseq.moe import Experts, MoELayer, TopKRouter, use_kernel
from xmoe_fairseq.moe.experts import Call, ExpertRows, Stacks, kernels, native
from xmoe_fairseq.moe.experts.kernels import KernelError, choose_kernel, expert_sums

SOURCES, MODEL_DIM, EXPERT_DIM = 9, 8, 16
LOADS = {
    "uneven": [4, 1, 0, 7],
    "one expert has all": [0, 9, 0, 0],
    "one row": [0, 0, 0, 1],
    "no rows": [0, 0, 0, 0],
}


@pytest.fixture(params=["native", "plain"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" takes there: with the native kernel's library, and without."""
    if request.param == "native":
        request.getfixturevalue("native_library")
    else:
        monkeypatch.setattr(native, "missing", lambda: "it is gone")
    return str(request.param)


def stacks_of(num_experts: int, dtype: torch.dtype) -> Stacks:
    experts = Experts(num_experts, MODEL_DIM, EXPERT_DIM).to(dtype)
    return Stacks(*(stack.detach() for stack in experts.stacked()))


def rows_of(counts: list[int], weighted: bool, dtype: torch.dtype = torch.float32) -> ExpertRows:
    """Within an expert each source at most once, as in any routing."""
    source_R = torch.cat([torch.randperm(SOURCES)[:count].sort().values for count in counts])
    weight_R = torch.rand(sum(counts), dtype=dtype) if weighted else None
    return ExpertRows(source_R, weight_R, torch.tensor(counts))


def values_and_gradients(kernel: str, *call: Any) -> list[Tensor]:
    return expert_calls.values_and_gradients(lambda *given: expert_sums(Call(*given), kernel), *call)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("load", LOADS)
def test_the_documented_kernel(
    load: str, weighted: bool, on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", dict(kernels._KERNELS))
    code = example("extending.md", "## A kernel for the experts", "python")
    exec(code, {})
    arguments = (torch.randn(9, 8), rows_of(LOADS[load], weighted), stacks_of(4, torch.float32), F.relu)
    assert_same(values_and_gradients("every", *arguments), values_and_gradients("plain", *arguments))
    without_hidden = (expert_sums(Call(*arguments, 1.0), kernel) for kernel in ("every", "plain"))
    assert_same(*without_hidden)
    assert choose_kernel(Call(*arguments)).name == on_cpu
    exec(code, {})  # a notebook's cell that runs again
    with pytest.raises(ValueError, match="kernel every is registered already"):
        kernels.register_kernel("every")(rows_of)
    many = Call(torch.randn(9, 8), rows_of([0] * 9, weighted), stacks_of(9, torch.float32), F.relu)
    with pytest.raises(KernelError, match="needs at most 8 experts, got 9"), use_kernel("every"):
        choose_kernel(many)


MODULES = {
    "of its own weight": (nn.PReLU(), lambda module, inner: F.prelu(inner, module.weight)),
    "random": (nn.RReLU(), lambda _, inner: F.rrelu(inner, training=True)),
    "in place": (nn.Hardswish(inplace=True), lambda _, inner: F.hardswish(inner)),
}


@pytest.mark.parametrize("activation", MODULES)
def test_a_module_may_be_the_activation(activation: str) -> None:
    module, function = MODULES[activation]
    experts, rows = Experts(4, MODEL_DIM, EXPERT_DIM, module.train()), rows_of([4, 1, 0, 7], True)
    x_SD = torch.randn(9, 8)
    leaves = [x_SD.requires_grad_(), *experts.parameters()]
    torch.manual_seed(1)
    got = torch.autograd.grad(experts(x_SD, rows).square().sum(), leaves)
    torch.manual_seed(1)
    y_SD = expert_sums(Call(x_SD, rows, experts.stacked(), partial(function, module)), "plain")
    assert_same(got, torch.autograd.grad(y_SD.square().sum(), leaves))
    with torch.no_grad():
        torch.manual_seed(1)
        assert_same(experts(x_SD, rows), y_SD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Sums are taken in the precision of the weights: fp32 at least."""
    rows, stacks = rows_of([4, 1, 0, 7], True), stacks_of(4, dtype)
    x_SD = torch.randn(9, 8, dtype=dtype)
    got = values_and_gradients("plain", x_SD, rows, stacks, F.gelu)
    exact = values_and_gradients(
        "plain", x_SD.double(), ExpertRows(rows.source_R, rows.weight_R.double(), rows.counts_E),
        Stacks(*(stack.double() for stack in stacks)), F.gelu,
    )  # fmt: skip
    assert got[0].dtype == torch.float32
    assert_same(got, [t.to(mine) for t, mine in zip(exact, got, strict=True)], terms=1, dtype=dtype)


def test_plain_autograd_has_the_right_gradients() -> None:
    rows = rows_of([2, 0, 3], True, torch.float64)
    inputs = [t.requires_grad_() for t in (torch.randn(9, 8).double(), *stacks_of(3, torch.float64))]

    def compute(x_SD: Tensor, *stacks: Tensor) -> Tensor:
        return expert_sums(Call(x_SD, rows, Stacks(*stacks), torch.tanh), "plain")

    assert torch.autograd.gradcheck(compute, inputs)


def test_autocast_computes_in_its_precision_and_leaves_fp32_gradients(on_cpu: str) -> None:
    experts, x_SD = Experts(4, MODEL_DIM, EXPERT_DIM, kernel=on_cpu), torch.randn(9, 8)
    rows = rows_of([4, 1, 0, 7], True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x_SD, rows)
    assert y.dtype == torch.float32  # the weights'
    assert_same(y, experts(x_SD, rows), terms=1, dtype=torch.bfloat16)
    assert not torch.equal(y, experts(x_SD, rows))
    y.sum().backward()
    assert experts.fc1_weight.grad.dtype == torch.float32


def call_of(x_SD: Any, stacks: Stacks | None = None, **more: Any) -> Call:
    dtype = x_SD.dtype
    return Call(
        x_SD, rows_of([0, 0], False), stacks or stacks_of(2, dtype), more.pop("activation", F.relu), **more
    )


def test_which_kernel_is_chosen(on_cpu: str) -> None:
    """By device, precision and activation; of one token or many, with gradients or without."""
    one, two = torch.ones(1, 8), torch.ones(2, 8)

    def chosen(call: Call) -> str:
        return choose_kernel(call).name

    with torch.no_grad():
        assert chosen(call_of(one)) == chosen(call_of(one[:0])) == on_cpu
        with torch.autocast("cpu", torch.bfloat16):
            assert chosen(call_of(one)) == on_cpu
        with torch.autocast("cpu", torch.float16):
            assert chosen(call_of(one)) == "plain"
    for call in (call_of(one), call_of(two.double()), call_of(two, dropout=0.1), call_of(two.bfloat16())):
        assert chosen(call) == on_cpu  # of the last grouped products could be made, but are for GPUs
    assert chosen(call_of(two.half())) == "plain"
    for activation in (torch.tanh, nn.ReLU()):
        assert chosen(call_of(two, activation=activation)) == "plain"


IMPOSSIBLE = [
    ("native", call_of(torch.ones(2, 8), activation=torch.tanh), "needs relu, gelu or silu, got tanh"),
    (
        "grouped",
        call_of(torch.ones(2, 8), activation=F.hardswish),
        "needs relu, gelu, silu or tanh, got hardswish",
    ),
]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_without_its_library_the_native_kernel_is_not_to_be_had_but_its_calls_are_computed(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", lambda: "it is gone")
    call = Call(torch.randn(9, 8), rows_of([4, 0, 2], True), stacks_of(3, torch.float32), F.relu, dropout)
    assert expert_sums(call).shape == (9, 8)
    with pytest.raises(KernelError) as error:
        expert_sums(call, "native")
    assert str(error.value) == (
        "kernel native (use_kernel, --moe-kernel) needs its compiled library, but it is gone; "
        "run: python -m xmoe_fairseq.moe.native"
    )


@pytest.mark.parametrize("name, call, why", IMPOSSIBLE, ids=[f"{name} {why}" for name, _, why in IMPOSSIBLE])
def test_an_impossible_choice_says_why(name: str, call: Call, why: str) -> None:
    with pytest.raises(KernelError) as error:
        expert_sums(call, name)
    assert str(error.value) == f"kernel {name} (use_kernel, --moe-kernel) {why}"


def test_one_token_to_one_expert_twice(native_library: None) -> None:
    """As a router of somebody's own may choose."""
    for weight_R in (None, torch.tensor([0.5, 0.25, 2.0])):
        rows = ExpertRows(torch.zeros(3, dtype=torch.long), weight_R, torch.tensor([0, 2, 0, 1]))
        call = Call(torch.randn(1, 8), rows, stacks_of(4, torch.float32), F.relu)
        with torch.no_grad():
            assert_same(expert_sums(call, "native"), expert_sums(call, "plain"))


def test_weights_in_another_precision_than_the_rows() -> None:
    rows = ExpertRows(torch.tensor([0]), torch.tensor([0.5]).double(), torch.tensor([0, 1, 0, 0]))
    call = Call(torch.randn(1, 8), rows, stacks_of(4, torch.float32), F.relu)
    with torch.no_grad():
        assert choose_kernel(call).name == "plain"
        assert expert_sums(call).dtype == torch.float64


def test_a_kernel_is_forced_in_a_block_in_its_thread_and_blocks_nest(on_cpu: str) -> None:
    call = call_of(torch.ones(2, 8))

    def chosen(name: str = "auto") -> str:
        return choose_kernel(call, name).name

    with use_kernel("plain"):
        assert chosen() == chosen("native") == "plain"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(chosen).result() == on_cpu
        with use_kernel("auto"):
            assert chosen("plain") == on_cpu
        assert chosen() == "plain"
    assert chosen() == on_cpu and chosen("plain") == "plain"


def test_compiled_code_has_no_native_kernel() -> None:
    """In which the choice would have to look for a file."""
    experts, x_SD, rows = Experts(4, MODEL_DIM, EXPERT_DIM), torch.randn(9, 8), rows_of([4, 1, 0, 7], True)
    compiled = torch.compile(lambda x_SD: experts(x_SD, rows), backend="eager")
    with torch.no_grad():
        assert_same(compiled(x_SD), experts(x_SD, rows))
    with use_kernel("native"), pytest.raises(Exception, match="needs eager mode, got torch.compile"):
        torch.compile(lambda x_SD: experts(x_SD, rows), backend="eager", fullgraph=True)(x_SD)


def test_a_layer_has_a_kernel_and_an_unknown_one_is_refused() -> None:
    layer = MoELayer(8, 4, 6, TopKRouter(8, 6, 2), activation=torch.tanh, kernel="native")
    assert "kernel=native" in repr(layer)
    with pytest.raises(KernelError, match="needs relu, gelu or silu, got tanh"):
        layer(torch.ones(3, 8))
    known = "kernel must be one of auto, native, grouped, plain.*, got fast"
    with pytest.raises(ValueError, match=known):
        MoELayer(8, 4, 6, TopKRouter(8, 6, 2), kernel="fast")
    with pytest.raises(ValueError, match=known), use_kernel("fast"):
        pass


def test_which_kernel_runs_is_said_once(on_cpu: str, caplog: pytest.LogCaptureFixture) -> None:
    kernels._say.cache_clear()
    caplog.set_level("INFO")
    for _ in range(2):
        expert_sums(call_of(torch.ones(2, 8)))
    assert caplog.messages == [f"experts are computed by kernel {on_cpu} (cpu, torch.float32)"]
