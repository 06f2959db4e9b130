"""What the benchmarks compare is equal, and their tables add up; at sizes at which no time means anything."""

import json
from pathlib import Path

import pytest
import torch
from tolerances import assert_same

from benchmarks import gpu
from benchmarks.gpu_subjects import TORCHTITAN
from benchmarks.subjects import PaperStyleExperts, SlotExperts, moe_layer
from xmoe_fairseq.moe import Experts, MoELayer, use_kernel
from xmoe_fairseq.moe.experts import Call, ExpertRows, Stacks
from xmoe_fairseq.moe.experts.kernels import expert_sums


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


@pytest.mark.parametrize("counts", [[4, 0, 16, 7], [0, 9, 0, 0], [0, 0, 0, 0]])
def test_torchtitans_way_equals_plain_autograd(counts: list[int]) -> None:
    torch.manual_seed(1)
    experts = Experts(4, 8, 16)
    source_R = torch.cat([torch.randperm(20)[:count] for count in counts])
    results = []
    for kernel in ("plain", TORCHTITAN):
        leaves = [
            tensor.detach().clone().requires_grad_() for tensor in (torch.ones(20, 8), *experts.stacked())
        ]
        weight_R = torch.linspace(0.1, 1, source_R.numel()).requires_grad_()
        rows = ExpertRows(source_R, weight_R, torch.tensor(counts))
        y = expert_sums(Call(leaves[0], rows, Stacks(*leaves[1:]), torch.relu), kernel)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append([y.detach(), weight_R.grad, *(leaf.grad for leaf in leaves)])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_benchmark_on_a_cpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what fails has its reason in its row."""

    def fails(*_: object) -> None:
        raise RuntimeError("tl.trans | has no axis\nat line 9")

    monkeypatch.setattr(gpu, "megablocks_layer", fails)
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
    reason = "RuntimeError: tl.trans / has no axis"
    assert results["failed"]["MegaBlocks, sparse"] == reason
    assert f"| MegaBlocks, sparse | {reason} |  |" in (tmp_path / "benchmark.md").read_text()
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
