"""What the benchmarks compare is equal, and their tables add up; at sizes at which no time means anything."""

import json
from pathlib import Path

import pytest
import torch
from tolerances import assert_same
from torch import Tensor

from benchmarks import gpu, training
from benchmarks.gpu_subjects import PADDED, PADDED_TO
from benchmarks.profile_layer import PRODUCTS, PYTHON, REST, by_kind, share_outside_products
from benchmarks.subjects import PaperStyleExperts, SlotExperts, moe_layer
from benchmarks.translation import batch, build_setup
from xmoe_fairseq.moe import Experts, MoELayer, use_kernel
from xmoe_fairseq.moe.experts import Call, ExpertRows, Stacks
from xmoe_fairseq.moe.experts.kernels import expert_sums

SMALL = [
    "--threads", "1", "--rounds", "2", "--per-token", "2", "--sentences", "6", "--vocabulary", "60",
    "--experts", "4", "--split", "2",
    "--flags", "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2",
]  # fmt: skip


@pytest.mark.parametrize("way", [PaperStyleExperts, SlotExperts])
def test_every_slot_keeps_the_most_probable_tokens_of_an_expert(way: type[PaperStyleExperts]) -> None:
    torch.manual_seed(1)
    x_TD = torch.randn(12, 8)
    layer = moe_layer(x_TD, num_experts=4, expert_dim=16, per_token=2.5)
    _, routing = layer(x_TD)
    slots = MoELayer(8, 16, 4, layer.router)
    slots.experts = way(layer.experts, capacity_factor=1.0)
    weight_TE = routing.combine_weights()
    kept_TE = torch.zeros_like(weight_TE).scatter(0, weight_TE.topk(3, dim=0).indices, 1.0)  # 12 tokens / 4
    outputs = [
        layer.experts(x_TD, ExpertRows(torch.arange(12), None, torch.eye(4, dtype=torch.long)[e] * 12))
        for e in range(4)
    ]
    expected = sum((weight_TE * kept_TE)[:, e, None] * outputs[e] for e in range(4))
    assert (weight_TE * (1 - kept_TE)).any(), "nothing was dropped"
    assert_same(slots(x_TD)[0], expected)


def test_training_compares_equal_models_and_its_table_adds_up(tmp_path: Path) -> None:
    training.main([*SMALL, "--moe-in", "both", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "benchmark.json").read_text())
    (row,) = results["threads"]["1"]
    names = ["chosen rows only", "paper's way", "its slots, no needless copies", "dense FFN"]
    assert list(row["update"]) == list(row["tokens per second"]) == names
    words = [row["update"][name]["milliseconds"] * row["tokens per second"][name] / 1000 for name in names]
    assert 6 * 20 <= words[0] <= 6 * 30
    assert words == pytest.approx([words[0]] * 4)
    table = (tmp_path / "benchmark.md").read_text()
    assert f"| {100 * share_outside_products(row['MoE layer']):.0f} % |" in table
    assert "2+2 layers, width 16, FFN 32, 2 heads" in table and "4 experts of width 16" in table


class Wrong(SlotExperts):
    def expert(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return super().expert(x, w1, b1, w2, b2 + 0.01)


def test_training_refuses_to_compare_unequal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = build_setup(training.parse(SMALL), "encoder")
    model = setup.model(sparse=True)
    sample = batch(setup, 3)
    training.calibrate(setup, model, sample, 2)
    training.check_equal(setup, model, sample)
    monkeypatch.setitem(training.EVERY_SLOT, "paper's way", Wrong)
    with pytest.raises(AssertionError, match="paper's way differs"):
        training.check_equal(setup, model, sample)


def test_times_by_kind_by_hand() -> None:
    found = by_kind(
        {"aten::mm": 60.0, "aten::addmm": 20.0, "aten::sort": 9.0, "aten::foo": 1.0, "_Function": 10.0}
    )
    busy = {kind: time for kind, time in found.items() if time}
    assert busy == {PRODUCTS: 80.0, "choosing and sorting": 9.0, REST: 1.0, PYTHON: 10.0}
    assert share_outside_products(found) == pytest.approx(0.2)


@pytest.mark.parametrize("counts", [[4, 0, PADDED_TO, 7], [0, 9, 0, 0], [0, 0, 0, 0]])
def test_padded_groups_equal_plain_autograd(counts: list[int]) -> None:
    torch.manual_seed(1)
    experts = Experts(4, 8, 16)
    source_R = torch.cat([torch.randperm(20)[:count] for count in counts])
    results = []
    for kernel in ("plain", PADDED):
        leaves = [
            tensor.detach().clone().requires_grad_() for tensor in (torch.ones(20, 8), *experts.stacked())
        ]
        weight_R = torch.linspace(0.1, 1, source_R.numel()).requires_grad_()
        rows = ExpertRows(source_R, weight_R, torch.tensor(counts))
        y = expert_sums(Call(leaves[0], rows, Stacks(*leaves[1:]), torch.relu), kernel)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append([y.detach(), weight_R.grad, *(leaf.grad for leaf in leaves)])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_benchmark_on_a_cpu(dtype: str, tmp_path: Path) -> None:
    sizes = {
        "tokens": 24,
        "model-dim": 16,
        "experts": 4,
        "expert-dim": 8,
        "per-token": 2,
        "rounds": 2,
        "calls": 1,
    }
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    backend = "eager" if dtype == "float32" else "none"  # torch.compile once
    gpu.main(
        [*flags, "--device", "cpu", "--dtype", dtype, "--compile-backend", backend, "--out", str(tmp_path)]
    )
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["forward FLOPs"] == 4 * 24 * 2 * 16 * 8
    assert set(gpu.WAYS) | {gpu.FLOOR, gpu.OURS} <= set(results["forward + backward"])
    ratio = results["forward + backward"][gpu.OURS]["ratio"]
    assert f"the layer reaches {1 / ratio:.0%}." in (tmp_path / "benchmark.md").read_text()
    assert ("router and permutation" in results) == (backend != "none")


def test_gpu_ways_give_equal_outputs() -> None:
    case = gpu.parse(["--device", "cpu", "--dtype", "float32", "--tokens", "24", "--model-dim", "16",
                      "--experts", "4", "--expert-dim", "8", "--per-token", "2"])  # fmt: skip
    x, layer = gpu.tokens(case), gpu.xmoe_layer(case)
    expected, routing = layer(x)
    assert routing.experts_per_token == 2
    for kernel in gpu.WAYS.values():
        with use_kernel(kernel):
            assert_same(layer(x)[0], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_benchmark_without_a_gpu_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^benchmark_gpu: .* needs a CUDA device"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
