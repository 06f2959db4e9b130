"""Every kernel equals plain autograd: values and every gradient; and which one is chosen."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import expert_calls
import pytest
import torch
import torch.nn.functional as F
from documented import example
from tolerances import TERMS, assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe_fairseq.moe import Experts, MoELayer, TopKRouter, use_kernel
from xmoe_fairseq.moe.experts import Call, ExpertRows, Stacks, kernels, native
from xmoe_fairseq.moe.experts import chunks as expert_chunks
from xmoe_fairseq.moe.experts.chunks import compute
from xmoe_fairseq.moe.experts.kernels import KernelError, choose_kernel, expert_sums

SOURCES, MODEL_DIM, EXPERT_DIM = 9, 8, 16
LOADS = {
    "uneven": [4, 1, 0, 7],
    "one expert has all": [0, 9, 0, 0],
    "one row": [0, 0, 0, 1],
    "no rows": [0, 0, 0, 0],
}
FAST = ["loop", *(["grouped"] if hasattr(F, "grouped_mm") else [])]


@pytest.fixture(params=["native", "loop"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" takes there: with the native kernel's library, and without."""
    monkeypatch.setattr(native, "missing", lambda: "" if request.param == "native" else "it is gone")
    return str(request.param)


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


def values_and_gradients(kernel: str, *call: Any) -> list[Tensor]:
    return expert_calls.values_and_gradients(lambda *given: expert_sums(Call(*given), kernel), *call)


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
    got = values_and_gradients(fast, *arguments)
    assert_same(got, values_and_gradients("plain", *arguments))


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
    assert choose_kernel(Call(*arguments)).name == on_cpu
    exec(code, {})  # a notebook's cell that runs again
    with pytest.raises(ValueError, match="kernel every is registered already"):
        kernels.register_kernel("every")(rows_of)
    many = Call(torch.randn(9, 8), rows_of([0] * 9, weighted), stacks_of(9, torch.float32), F.relu)
    with pytest.raises(KernelError, match="needs at most 8 experts, got 9"), use_kernel("every"):
        choose_kernel(many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("counts", [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_token(activation: str, counts: list[int], weighted: bool, dtype: torch.dtype) -> None:
    weight_R = torch.rand(sum(counts), dtype=dtype) if weighted else None
    rows = ExpertRows(torch.zeros(sum(counts), dtype=torch.long), weight_R, torch.tensor(counts))
    call = Call(torch.randn(1, 8, dtype=dtype), rows, stacks_of(4, dtype), ACTIVATIONS[activation])
    before = [stack.clone() for stack in call.stacks]
    with torch.no_grad():
        y_1D = expert_sums(call, "single")
    assert_same(y_1D, expert_sums(call, "plain"))
    assert all(map(torch.equal, call.stacks, before))  # what is added to are copies


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
    y_SD = expert_sums(Call(x_SD, rows, experts.stacked(), module), "plain")
    assert_same(got, torch.autograd.grad(y_SD.square().sum(), leaves))
    with torch.no_grad():
        torch.manual_seed(1)
        assert_same(experts(x_SD, rows), y_SD)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_experts(load: str, weighted: bool) -> None:
    rows, stacks, x_SD = rows_of(LOADS[load], weighted), stacks_of(4, torch.float32), torch.randn(9, 8)
    got = values_and_gradients("loop", x_SD, rows, stacks, F.gelu)
    expected = values_and_gradients("plain", x_SD, rows, stacks, F.gelu)
    assert_same(got, expected)
    with torch.no_grad():
        assert_same(expert_sums(Call(x_SD, rows, stacks, F.gelu), "loop"), expected[0])
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
    got = values_and_gradients(fast, x_SD, rows, stacks, F.gelu)
    exact = values_and_gradients(
        "plain", x_SD.double(), ExpertRows(rows.source_R, rows.weight_R.double(), rows.counts_E),
        Stacks(*(stack.double() for stack in stacks)), F.gelu,
    )  # fmt: skip
    assert got[0].dtype == wide
    assert_same(got, [t.to(mine) for t, mine in zip(exact, got, strict=True)], terms=terms, dtype=dtype)


def test_plain_autograd_has_the_right_gradients() -> None:
    rows = rows_of([2, 0, 3], True, torch.float64)
    inputs = [t.requires_grad_() for t in (torch.randn(9, 8).double(), *stacks_of(3, torch.float64))]

    def compute(x_SD: Tensor, *stacks: Tensor) -> Tensor:
        return expert_sums(Call(x_SD, rows, Stacks(*stacks), torch.tanh), "plain")

    assert torch.autograd.gradcheck(compute, inputs)


def test_strided_and_expanded_inputs() -> None:
    rows, stacks = rows_of([4, 1, 0, 7], True), stacks_of(4, torch.float32)
    x_SD = torch.randn(8, 9).t()
    call = Call(x_SD.requires_grad_(), rows, stacks, F.relu)
    y, plain = expert_sums(call, "loop"), expert_sums(call, "plain")
    assert_same(y, plain)
    y.sum().backward()  # an expanded gradient
    (expected,) = torch.autograd.grad(plain.sum(), x_SD)
    assert_same(x_SD.grad, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_loop_gives_the_same_bits_every_time(threads: int, request: pytest.FixtureRequest) -> None:
    if threads == 3:
        request.getfixturevalue("three_threads")
    rows, stacks, x_SD = rows_of([4, 1, 9, 7], True), stacks_of(4, torch.float32), torch.randn(9, 8)
    first, second = (values_and_gradients("loop", x_SD, rows, stacks, F.relu) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", ["native", "loop"])
def test_autocast_computes_in_its_precision_and_leaves_fp32_gradients(kernel: str) -> None:
    experts, x_SD = Experts(4, MODEL_DIM, EXPERT_DIM, kernel=kernel), torch.randn(9, 8)
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
        stacks = stacks_of(2, torch.float32)
        y = expert_sums(Call(torch.randn(9, 8), rows_of([3, 0], True), stacks, F.relu), "loop")
    assert y.grad_fn is None


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
        expert_sums(Call(x_SD, rows, stacks, F.relu), "grouped").backward(grad_SD)
    assert torch.bfloat16 not in sums.dtypes
    exact_rows = ExpertRows(source_R, rows.weight_R.double(), rows.counts_E)
    expert_sums(Call(x_SD.double(), exact_rows, exact, F.relu), "plain").backward(grad_SD.double())
    for got, expected in ((stacks.fc1_bias, exact.fc1_bias), (stacks.fc2_bias, exact.fc2_bias)):
        assert (got.grad.double() - expected.grad).norm() < 0.02 * expected.grad.norm()
        assert not got.grad[1].any()


def call_of(x_SD: Any, stacks: Stacks | None = None, **more: Any) -> Call:
    dtype = x_SD.dtype
    return Call(
        x_SD, rows_of([0, 0], False), stacks or stacks_of(2, dtype), more.pop("activation", F.relu), **more
    )


def test_which_kernel_is_chosen(on_cpu: str) -> None:
    """By device, precision, size, activation, dropout and grad mode."""
    one, two, has_library = torch.ones(1, 8), torch.ones(2, 8), on_cpu == "native"

    def chosen(call: Call) -> str:
        return choose_kernel(call).name

    for_one = "native" if has_library else "single"
    with torch.no_grad():
        assert chosen(call_of(one)) == chosen(call_of(one.double())) == for_one
        assert chosen(call_of(one, activation=torch.tanh)) == "single"
        assert chosen(call_of(two)) == chosen(call_of(one[:0])) == on_cpu
        assert chosen(call_of(one.bfloat16())) == on_cpu  # sums are fp32
        with torch.autocast("cpu", torch.bfloat16):
            assert chosen(call_of(one)) == on_cpu
        with torch.autocast("cpu", torch.float16):
            assert chosen(call_of(one)) == "loop"
    assert chosen(call_of(one)) == on_cpu  # gradients
    assert chosen(call_of(two, activation=torch.tanh)) == chosen(call_of(two.half())) == "loop"
    for call in (call_of(one, dropout=0.1), call_of(two.bfloat16(), dropout=0.1)):
        assert chosen(call) == ("native" if has_library else "plain")
    assert chosen(call_of(one, dropout=0.1, activation=torch.tanh)) == "plain"
    assert chosen(call_of(two, activation=nn.ReLU())) == "plain"
    assert chosen(call_of(two.bfloat16())) == on_cpu  # grouped products could, but are for GPUs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Looks like bf16 rows on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    return SimpleNamespace(is_cuda=True, is_cpu=False, dtype=torch.bfloat16, device=torch.device("cuda"))


def test_grouped_products_are_chosen_on_a_gpu_where_torch_has_them(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch is accepted from 2.6 on; its grouped product is public since 2.10."""
    call = call_of(gpu, Stacks(*(torch.zeros(2, 16, 16) for _ in range(4))))
    assert choose_kernel(call).name == "grouped"
    monkeypatch.delattr(F, "grouped_mm")
    assert choose_kernel(call).name == "loop"
    with pytest.raises(KernelError, match="needs torch 2.10 or later, got "):
        choose_kernel(call, "grouped")


def stacks_like(*shape: int) -> Stacks:
    return Stacks(*(torch.zeros(shape) for _ in range(4)))


IMPOSSIBLE = [
    ("native", call_of(torch.ones(2, 8), activation=torch.tanh), "needs relu, gelu or silu, got tanh"),
    ("single", call_of(torch.ones(1, 8)), "needs torch.no_grad(), got grad mode"),
    ("single", call_of(torch.ones(2, 8)), "needs one token, got 2"),
    ("loop", call_of(torch.ones(2, 8), dropout=0.1), "needs experts without dropout, got 0.1"),
    (
        "loop",
        call_of(torch.ones(2, 8), activation=nn.PReLU()),
        "needs a function as activation, got the module PReLU",
    ),
    (
        "grouped",
        call_of(torch.ones(2, 8).double()),
        "needs torch.bfloat16 or torch.float16 or torch.float32 on cpu, got torch.float64",
    ),
    (
        "grouped",
        call_of(torch.ones(2, 6), stacks_like(2, 16, 6)),
        "needs widths of a multiple of 16 bytes, got [16, 6] x 4",
    ),
    ("grouped", call_of(torch.ones(2, 8), stacks_like(1024, 16, 8)), "needs at most 1023 experts, got 1024"),
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
def test_an_impossible_choice_says_why(
    name: str, call: Call, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    with pytest.raises(KernelError) as error:
        expert_sums(call, name)
    assert str(error.value) == f"kernel {name} (use_kernel, --moe-kernel) {why}"


def test_one_token_to_one_expert_twice() -> None:
    """As a router of somebody's own may choose."""
    for weight_R in (None, torch.tensor([0.5, 0.25, 2.0])):
        rows = ExpertRows(torch.zeros(3, dtype=torch.long), weight_R, torch.tensor([0, 2, 0, 1]))
        call = Call(torch.randn(1, 8), rows, stacks_of(4, torch.float32), F.relu)
        with torch.no_grad():
            for name in ("native", "single"):
                assert_same(expert_sums(call, name), expert_sums(call, "plain"))


def test_weights_in_another_precision_than_the_rows() -> None:
    rows = ExpertRows(torch.tensor([0]), torch.tensor([0.5]).double(), torch.tensor([0, 1, 0, 0]))
    call = Call(torch.randn(1, 8), rows, stacks_of(4, torch.float32), F.relu)
    with torch.no_grad():
        assert choose_kernel(call).name == "loop"
        assert_same(expert_sums(call), expert_sums(call, "plain"))


def test_a_kernel_is_forced_in_a_block_in_its_thread_and_blocks_nest(on_cpu: str) -> None:
    call = call_of(torch.ones(2, 8))

    def chosen(name: str = "auto") -> str:
        return choose_kernel(call, name).name

    with use_kernel("plain"):
        assert chosen() == chosen("loop") == "plain"
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


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch < 2.10")
def test_the_choice_does_not_break_a_compiled_graph() -> None:
    experts, x_SD = Experts(4, MODEL_DIM, EXPERT_DIM).bfloat16(), torch.randn(9, 8).bfloat16()
    rows = rows_of([4, 1, 0, 7], True)

    def compute(x_SD: Tensor, *of_rows: Tensor) -> Tensor:
        return experts(x_SD, ExpertRows(*of_rows))

    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    with use_kernel("grouped"):
        y_SD = compiled(x_SD, rows.source_R, rows.weight_R, rows.counts_E)
        assert_same(y_SD, experts(x_SD, rows))


def test_a_layer_has_a_kernel_and_an_unknown_one_is_refused() -> None:
    layer = MoELayer(8, 4, 6, TopKRouter(8, 6, 2), kernel="single")
    assert "kernel=single" in repr(layer)
    with torch.no_grad(), pytest.raises(KernelError, match="needs one token, got 3"):
        layer(torch.ones(3, 8))
    known = "kernel must be one of auto, native, single, grouped, loop, plain.*, got fast"
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
