"""The grouped kernel, by torch's product and one expert after the other: values, gradients, what it keeps."""

from collections import Counter
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_calls import layer_values_and_gradients, values_and_gradients
from reference import reference_layer
from tolerances import assert_same
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from xmoe_fairseq.moe import Experts, MoELayer, ThresholdRouter, TopKRouter, use_kernel
from xmoe_fairseq.moe.dispatch.gather_sum import BySource
from xmoe_fairseq.moe.experts import Call, ExpertRows, Stacks, grouped, products
from xmoe_fairseq.moe.experts.kernels import KernelError, choose_kernel, expert_sums
from xmoe_fairseq.moe.experts.products import Groups, lacks, product

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
LOADS = {
    "uneven": [4, 1, 0, 7],
    "one has all": [0, 9, 0, 0],
    "one row": [0, 0, 0, 1],
    "no rows": [0, 0, 0, 0],
}
SOURCES = 9


@pytest.fixture(params=["grouped", "in turn"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By torch's grouped product, or one expert after the other."""
    if request.param == "in turn":
        monkeypatch.setattr(products, "lacks", lambda call: "another card")
    elif not hasattr(F, "grouped_mm"):
        pytest.skip("torch < 2.10")
    return str(request.param)


def call_of(
    counts: list[int], dtype: torch.dtype = torch.float32, activation: Any = F.relu, *,
    weighted: bool = True, widths: tuple[int, int] = (8, 16), sources: int = SOURCES, dropout: float = 0.0,
) -> Call:  # fmt: skip
    """Within an expert each source at most once, as in any routing."""
    source_R = torch.cat([torch.randperm(sources)[:count].sort().values for count in counts])
    weight_R = torch.rand(sum(counts), dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    stacks = Stacks(*(s.detach() for s in Experts(len(counts), *widths).to(dtype).stacked()))
    rows = ExpertRows(source_R, weight_R, torch.tensor(counts))
    return Call(torch.randn(sources, widths[0]).to(dtype), rows, stacks, activation, dropout)


def of_kernel(name: str, call: Call, seed: int = 7) -> list[Tensor]:
    def compute(*of_call: Any) -> Tensor:
        torch.manual_seed(seed)
        return expert_sums(Call(*of_call, call.dropout), name)

    return values_and_gradients(compute, *call[:4])


def exactly(call: Call) -> list[Tensor]:
    """By plain autograd in fp64."""
    weight_R = call.rows.weight_R
    rows = ExpertRows(call.rows.source_R, None if weight_R is None else weight_R.double(), call.rows.counts_E)
    stacks = Stacks(*(stack.double() for stack in call.stacks))
    return of_kernel("plain", Call(call.x_SD.double(), rows, stacks, call.activation))


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_equals_plain_autograd(activation: str, load: str, weighted: bool, way: str) -> None:
    call = call_of(LOADS[load], activation=ACTIVATIONS[activation], weighted=weighted)
    assert_same(of_kernel("grouped", call), of_kernel("plain", call))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_every_precision(dtype: torch.dtype, weighted: bool, way: str, monkeypatch: Any) -> None:
    if dtype == torch.float64:  # which torch's product does not know
        monkeypatch.undo()
    call = call_of([4, 1, 0, 7], dtype, F.gelu, weighted=weighted)
    got = of_kernel("grouped", call)
    assert got[0].dtype == (torch.promote_types(dtype, torch.float32) if weighted else dtype)
    expected = [t.to(mine) for t, mine in zip(exactly(call), got, strict=True)]
    assert_same(got, expected, terms=256 if dtype.itemsize > 2 else 1, dtype=dtype)


@pytest.mark.parametrize(
    "widths, dtype", [((7, 5), torch.float32), ((12, 20), torch.bfloat16), ((1, 1), torch.float16)]
)
def test_odd_widths(widths: tuple[int, int], dtype: torch.dtype) -> None:
    call = call_of([4, 1, 0, 7], dtype, widths=widths)
    assert "widths of a multiple of 16 bytes" in lacks(call) or not hasattr(F, "grouped_mm")
    got = of_kernel("grouped", call)
    expected = [t.to(mine) for t, mine in zip(exactly(call), got, strict=True)]
    assert_same(got, expected, terms=256 if dtype == torch.float32 else 1, dtype=dtype)


def test_more_experts_than_torch_takes_groups() -> None:
    call = call_of([0] * 600 + [3] + [0] * 599 + [2], torch.float32)
    assert lacks(call) or not hasattr(F, "grouped_mm")
    assert_same(of_kernel("grouped", call), of_kernel("plain", call))


def test_a_layer_equals_the_oracle(way: str) -> None:
    layer = MoELayer(8, 16, 6, TopKRouter(8, 6, 2), activation="gelu", kernel="grouped")
    x_TD = torch.randn(12, 8)
    got = layer_values_and_gradients(layer, x_TD)
    oracle_TD = x_TD.clone().requires_grad_()
    expected = reference_layer(layer, oracle_TD)
    loss = expected.y_TD.square().sum() + expected.load_balance_loss
    gradients = torch.autograd.grad(loss, [oracle_TD, *layer.parameters()])
    assert_same(got, [expected.y_TD.detach(), *gradients])
    y_TD, _ = layer(x_TD[:0])
    assert y_TD.shape == (0, 8)
    y_TD.sum().backward()
    assert not any(p.grad.any() for p in layer.experts.parameters())


def test_one_token_to_one_expert_twice(way: str) -> None:
    """As a router of somebody's own may choose."""
    call = call_of([0, 2, 0, 1], sources=2)
    rows = ExpertRows(torch.zeros(3, dtype=torch.long), call.rows.weight_R, call.rows.counts_E)
    assert_same(of_kernel("grouped", call._replace(rows=rows)), of_kernel("plain", call._replace(rows=rows)))


@pytest.mark.parametrize("load", LOADS)
def test_in_the_order_that_a_gpu_adds_rows_in(load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BySource, "of", BySource.sorted)
    call = call_of(LOADS[load])
    with Ops() as ops:
        got = of_kernel("grouped", call)
    assert not ops.scattered
    assert_same(got, of_kernel("plain", call))


class Ops(TorchDispatchMode):
    """How often each operator ran; into what precision rows are added one by one, on a GPU by atomics."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()
        self.scattered: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").strip("_")
        self.number[name] += 1
        if name in ("index_add", "index_put", "scatter_add"):
            self.scattered.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_bias_gradients_of_many_rows(way: str) -> None:
    """Of gradients with a mean, which a sum in bf16 stops following after a few hundred rows. (A CPU's
    index_add takes its sums in fp32, so the value alone would not show it here.)"""
    call = call_of([3000, 0, 1000, 90], torch.bfloat16, sources=4096)
    exact = Stacks(*(stack.double().requires_grad_() for stack in call.stacks))
    stacks = Stacks(*(stack.requires_grad_() for stack in call.stacks))
    grad_SD = torch.randn(4096, 8) + 0.5
    with Ops() as ops:
        expert_sums(call._replace(stacks=stacks), "grouped").backward(grad_SD)
    assert ops.scattered <= {torch.float32}
    rows = ExpertRows(call.rows.source_R, call.rows.weight_R.double(), call.rows.counts_E)
    expert_sums(Call(call.x_SD.double(), rows, exact, F.relu), "plain").backward(grad_SD.double())
    for got, expected in ((stacks.fc1_bias, exact.fc1_bias), (stacks.fc2_bias, exact.fc2_bias)):
        assert (got.grad.double() - expected.grad).norm() < 0.01 * expected.grad.norm()
        assert not got.grad[1].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_keeps_the_pre_activations_alone(dropout: float, way: str) -> None:
    model_dim, expert_dim, counts = 256, 128, [300, 0, 150, 62]
    call = call_of(counts, torch.bfloat16, widths=(model_dim, expert_dim), sources=400, dropout=dropout)
    stacks = Stacks(*(stack.requires_grad_() for stack in call.stacks))
    given = {t.untyped_storage().data_ptr() for t in (call.x_SD, *stacks, *vars(call.rows).values())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_SD = expert_sums(call._replace(stacks=stacks), "grouped")
    assert y_SD.requires_grad and given & kept.keys()
    bytes_kept = sum(size for place, size in kept.items() if place not in given)
    assert bytes_kept <= 0.56 * sum(counts) * model_dim * 2


def masked(call: Call, seed: int) -> Call:
    """The call whose activation leaves out what dropout takes of the given one."""
    torch.manual_seed(seed)
    drawn = int(torch.randint(2**62, (1,)))
    inner_RF = torch.empty(call.rows.source_R.numel(), call.stacks.fc1_bias.size(1), dtype=call.dtype)
    kept_RF = grouped._keep(inner_RF, call.dropout, drawn)
    activation = grouped.dropped(call.activation, kept_RF, 1 / (1 - call.dropout), call.rows.counts_E)
    return call._replace(activation=activation, dropout=0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_takes_the_same_forward_and_backward(activation: str, way: str) -> None:
    call = call_of([4, 1, 0, 7], activation=ACTIVATIONS[activation], dropout=0.4)
    got = of_kernel("grouped", call)
    assert_same(got, of_kernel_once("plain", masked(call, 7)))
    assert not torch.equal(got[0], of_kernel("grouped", call, seed=8)[0])


def of_kernel_once(name: str, call: Call) -> list[Tensor]:
    """Of an activation that knows its rows, and so can be called once."""
    return values_and_gradients(lambda *of_call: expert_sums(Call(*of_call), name), *call[:4])


def test_how_much_dropout_takes() -> None:
    ones = torch.ones(400, 50)
    kept = grouped._keep(ones, 0.25, 3)
    assert 0.73 < kept.float().mean() < 0.77
    assert torch.equal(grouped._dropout(ones, kept, 0.25), kept / 0.75)
    assert torch.equal(kept, grouped._keep(ones.bfloat16(), 0.25, 3))
    all_of_them = call_of([4, 1, 0, 7], dropout=1.0)
    assert_same(expert_sums(all_of_them, "grouped"), expert_sums(all_of_them, "plain"))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_to_double_precision_and_those_of_gradients(dropout: float) -> None:
    call = call_of([2, 0, 3], torch.float64, torch.tanh, widths=(3, 4), sources=4, dropout=dropout)

    def compute(x_SD: Tensor, weight_R: Tensor, *stacks: Tensor) -> Tensor:
        torch.manual_seed(7)
        rows = ExpertRows(call.rows.source_R, weight_R, call.rows.counts_E)
        return expert_sums(call._replace(x_SD=x_SD, rows=rows, stacks=Stacks(*stacks)), "grouped")

    inputs = [t.requires_grad_() for t in (call.x_SD, call.rows.weight_R, *call.stacks)]
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


def test_a_recomputed_layer_takes_the_same_units() -> None:
    layer = MoELayer(8, 16, 4, TopKRouter(8, 4, 2), activation_dropout=0.5, kernel="grouped")
    gradients = []
    for recompute in (False, True):
        x_TD = torch.linspace(-1, 1, 80).view(10, 8).requires_grad_()
        torch.manual_seed(3)
        y_TD = checkpoint(lambda x: layer(x)[0], x_TD, use_reentrant=False) if recompute else layer(x_TD)[0]
        gradients.append(torch.autograd.grad(y_TD.square().sum(), [x_TD, *layer.experts.parameters()]))
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, way: str) -> None:
    """As --amp has it: fp32 parameters, and gradients."""
    layer = MoELayer(8, 16, 4, TopKRouter(8, 4, 2), kernel="grouped")
    exact, x_TD = deepcopy(layer), torch.randn(12, 8)
    with torch.autocast("cpu", dtype):
        got = layer_values_and_gradients(layer, x_TD)
    expected = layer_values_and_gradients(exact, x_TD)
    assert {t.dtype for t in got} == {torch.float32}
    assert not torch.equal(got[0], expected[0])
    assert_same(got, expected, terms=1, dtype=dtype)


PARTS = {"x": 4, "weight": 3, "fc1_weight": 4, "fc1_bias": 4, "fc2_weight": 3, "fc2_bias": 3}  # products


@pytest.mark.parametrize("wanted", PARTS)
def test_gradients_that_nobody_wants_cost_no_products(wanted: str) -> None:
    call = call_of([4, 1, 0, 7], torch.bfloat16)
    inputs = dict(zip(PARTS, (call.x_SD, call.rows.weight_R, *call.stacks), strict=True))
    inputs[wanted].requires_grad_()
    with Ops() as ops:
        expert_sums(call, "grouped").sum().backward()
    assert ops.number["grouped_mm"] == PARTS[wanted] or not hasattr(F, "grouped_mm")
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [wanted]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch < 2.10")
def test_what_torch_leaves_in_gradients_of_experts_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a B200: numbers from elsewhere in its memory."""
    call, product_of = call_of([4, 1, 0, 7]), F.grouped_mm

    def leaving(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        result = product_of(a, b, offs=offs)
        if b.dim() == 2:
            result[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return result

    monkeypatch.setattr(F, "grouped_mm", leaving)
    assert_same(of_kernel("grouped", call), of_kernel("plain", call))


class Lists(TorchFunctionMode):
    """How often the host asks for the numbers of a tensor, for which it waits if that is on a GPU."""

    number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.cpu, Tensor.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("load", ["uneven", "no rows"])
def test_how_often_the_host_waits(load: str, way: str) -> None:
    call = call_of(LOADS[load], torch.bfloat16)
    call.stacks.fc1_weight.requires_grad_()
    with Lists() as forward:
        y_SD = expert_sums(call, "grouped")
    with Lists() as backward:
        y_SD.sum().backward()
    waits = (way == "in turn") * (load != "no rows")
    assert (forward.number, backward.number) == (waits, 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Looks like rows on a card of the capability that is set."""
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)

    def rows(
        capability: tuple[int, int], dtype: torch.dtype, experts: int = 2, widths: Any = (16, 16)
    ) -> Any:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        x_SD = SimpleNamespace(is_cuda=True, is_cpu=False, dtype=dtype, device=torch.device("cuda"))
        stacks = Stacks(*(torch.empty(experts, *widths, device="meta") for _ in range(4)))
        return Call(x_SD, ExpertRows(torch.empty(0), None, torch.empty(0)), stacks, F.relu)

    return rows


def test_which_calls_torchs_product_takes_on_a_gpu_without_a_wait(gpu: Any, monkeypatch: Any) -> None:
    bf16 = torch.bfloat16
    assert lacks(gpu((9, 0), bf16)) == lacks(gpu((10, 3), bf16, 1023)) == ""
    assert lacks(gpu((8, 6), bf16)) == "compute capability 9 or 10, got 8.6"
    assert lacks(gpu((12, 0), bf16)) == "compute capability 9 or 10, got 12.0"
    assert lacks(gpu((9, 0), torch.float16)) == "torch.bfloat16, got torch.float16"
    assert lacks(gpu((9, 0), torch.float32)) == "torch.bfloat16, got torch.float32"
    assert lacks(gpu((9, 0), bf16, 1024)) == "at most 1023 experts, got 1024"
    assert lacks(gpu((9, 0), bf16, 2, (16, 12))) == "widths of a multiple of 16 bytes, got [16, 12] x 2"
    monkeypatch.delattr(F, "grouped_mm")
    assert lacks(gpu((9, 0), bf16)) == f"torch 2.10 or later, got {torch.__version__}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_on_a_gpu_it_is_chosen_for_every_precision(gpu: Any, dtype: torch.dtype) -> None:
    call = gpu((8, 0), dtype, 2000)
    assert choose_kernel(call).name == choose_kernel(call._replace(dropout=0.1)).name == "grouped"
    call = call._replace(activation=F.hardswish)
    assert choose_kernel(call).name == "plain"
    with pytest.raises(KernelError, match="needs relu, gelu, silu or tanh, got hardswish"):
        choose_kernel(call, "grouped")


def test_why_the_host_waits_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    products._say.cache_clear()
    caplog.set_level("INFO", "xmoe_fairseq.moe.experts.products")
    for _ in range(2):
        expert_sums(call_of([1, 2], torch.float64), "grouped")
    (said,) = [message for message in caplog.messages if "grouped product" in message]
    needed = "torch's grouped product needs "
    assert said.startswith(f"experts follow one another, and the host waits once per call: {needed}")


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_both_products(columns: bool, way: str) -> None:
    counts = [3, 0, 5]
    ends_E = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    a_RK = torch.randn(8, 4)
    a, b = (a_RK.t(), torch.randn(8, 12)) if columns else (a_RK, torch.randn(3, 4, 12))
    got = product(a, b, Groups(ends_E, counts if way == "in turn" else None))
    pieces = [slice(0, 3), slice(3, 3), slice(3, 8)]
    if columns:
        assert_same(got, torch.stack([a[:, piece] @ b[piece] for piece in pieces]))
    else:
        assert_same(got, torch.cat([a[piece] @ w for piece, w in zip(pieces, b, strict=True)]))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch < 2.10")
def test_it_does_not_break_a_compiled_graph() -> None:
    experts, call = Experts(4, 8, 16).bfloat16(), call_of([4, 1, 0, 7], torch.bfloat16)

    def compute(x_SD: Tensor, *of_rows: Tensor) -> Tensor:
        return experts(x_SD, ExpertRows(*of_rows))

    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    with use_kernel("grouped"):
        y_SD = compiled(call.x_SD, *vars(call.rows).values())
        assert_same(y_SD, experts(call.x_SD, call.rows))


def test_a_layer_that_chooses_by_threshold_compiles_whole() -> None:
    """How many rows there are is then no number that could be asked for."""
    torch._dynamo.reset()
    layer = MoELayer(8, 8, 4, ThresholdRouter(8, 4, 0.6), kernel="grouped", activation="gelu")
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True)
    x_TD = torch.randn(12, 8)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same(compiled(x_TD)[0], layer(x_TD)[0])
